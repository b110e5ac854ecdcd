"""Kills ranks at random moments, and compares how runs end with one that nobody has disturbed.

    python -m bench.kills --kills 100
    python -m bench.kills --kills 100 --without-disk
    python -m bench.kills --kills 100 --without-disk --any-ranks --world-size 4
    python -m bench.kills --kills 10 --without-disk --training all
    python -m bench.kills --kills 100 --without-disk --hosts 2 --world-size 4

A run trains a small GPT for some steps. A rank and a moment are drawn: while it wraps the model, loads, runs a forward, a backward, a step,
its first step, in which parameters of a new run move, or a save. When the rank says that it is there, it is killed (SIGKILL) after a random
time of some milliseconds. The others have to end by themselves; then all are started again, and go on. Behind the last kill of a run
it trains to its end. The parameters of every rank, and the state, must have the hashes of the undisturbed run; with --without-disk, so must
what another model has of the last copies of all ranks.

With --any-ranks each start has another number of ranks, and `micro_batches` sees to it that the bits are the same.

With --without-disk nothing is saved: `zeroopt.elastic.Guard` keeps each rank's part in memory, and each start has to go on from the last step
that all ranks had done, or the one before. With --hosts ranks are taken to be on so many hosts, and all of one are killed, and lost with its
memory.

With --training other kinds of training take its place: shard groups, 16 bits, codes, several optimizers and so on.

    kinds     what is trained
    marks     what ranks are doing, for whoever wants to kill them
    training  what they do
    runs      starts them, kills one, and starts them again
    cost      what copies in memory cost in time
"""

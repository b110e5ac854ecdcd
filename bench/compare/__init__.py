"""Every way to train data-parallel, on the same model, data, seed and precision: `python -m bench.compare`.

In the order in which a figure comes about:

    setting.py      what all methods have in common: model, data, precision, ranks
    methods/        how each of them prepares a model and an optimizer, and trains; `methods.METHODS` has them all
    formula.py      the bytes a parameter that each should hold
    rank.py         what a rank does: wrap, warm up while it is watched, train while it is timed, be profiled
    clock.py, peak.py, network.py, bandwidth.py, timeline.py
                    what it measures with
    launch.py       one method, once, in processes of its own; `Run` is all that is known of it
    rounds.py       all methods in turn, again and again
    summary.py      medians and spread of all rounds, whether the losses agree, the limit line
    table.py, plots/, results.py
                    how that is told
    budget.py       the largest model that trains in so many bytes
"""

"""Training over slow links: hosts made of namespaces on this machine, links held to a rate and a delay, and bytes counted on them.

    python -m bench.network
    python -m bench.network --links 100mbit 1gbit+10ms --hosts 4 --methods DDP "stage 2"

link.py         how fast a link is, and how long it takes
relay.py        a process that carries packets between hosts after a delay
hosts.py        hosts, and the links between them
first.py        the first process of a host, which forks its ranks
methods.py      what trains
rank.py         what each rank does, and what it has measured
results.py      one row a method, and the table
plot.py         the picture

It needs root and the programs ip, tc and unshare; where there can be no namespaces, it says so.
"""

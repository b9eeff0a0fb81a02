"""Several processes that share a model's experts: transformers' expert parallelism, each with a cache of its own.

transformers is the engine: it splits the model, and exchanges what the ranks compute. Here is what one process of a run
asks of the others, and nothing that a process alone needs.

    join.py        where a run begins: the group is formed, and the ranks find that they run the same
    settings.py    what a run of ranks cannot do, refused by name
    group.py       `Group`: the ranks of this run; what they tell each other, with a time limit for each wait
    store.py       where they meet, asked with a time limit
    watch.py       `Watch`: who is still there
    peers.py       what must be the same on every rank, compared before anything runs
    call.py        a model's call on every rank: the same input, and an end for all when one ends
    orders.py      what rank 0 gives the others to do
    merge.py       counters and profiles of all ranks together
    names.py       how a rank is called in messages
    pretend.py     a rank that is not there, to plan for

Words: a *rank* is one process, the *world* how many there are. Which experts a rank has is `experts/share.py`.
"""

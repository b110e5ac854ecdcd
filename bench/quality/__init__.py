"""Does a way to train that loses something still come to the loss that DistributedDataParallel comes to?

tasks       what is learned: by which model, from what, for how many steps
methods     ways to train, by name
training    one run: a task by a method from a seed
"""

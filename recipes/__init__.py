"""What one trains, each as a short script on plain torch and zeroopt that stands beside DistributedDataParallel.

    python -m recipes.generate                                          two ranks on this machine, by DDP and then by zeroopt
    torchrun --nproc-per-node 8 -m recipes.generate --preset 1.5b       the same script at a real size

docs/recipes/ has a page of each. In reading order:

    outcome       what a training has come to
    memory        what a rank holds
    run           progress, and what is noted down
    method        DDP or zeroopt around a model
    side_by_side  both, one after the other, and what to think of them
    command       options, and what happens when a recipe is called
    sampling      which samples a step has on a rank
    transformer   blocks for text and images
    text          Python's documentation as text and tokens
    digits        handwritten digits, and pictures of them
    vit           a vision transformer
    generate      a GPT that writes, and answers questions
    understand    masked words, and then a domain with few labels
    adapt         a GPT that stays as it is learns to answer, and what is preferred, by adapters
    many_tasks    one trunk, several heads
    see           what is in an image
    see_and_read  pictures and captions
    launch        each of them on many machines
"""

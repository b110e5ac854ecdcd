"""All parts, in the order of what they are worth: what is cut short has the most important ones.

Together their limits are beyond the time that there is: a part that is through earlier leaves the rest of its time to the others.
"""

from bench.gpu import build, kernels, sanitizer, several, tests
from bench.gpu.part import Part
from bench.gpu.step_table import of_shape, on_all_gpus

PARTS = (
    Part("build", "Which kernels are there, and what do they run on?", 180, build.run),
    Part("kernels' tests", "Do the kernels give the CPU's results, bit for bit?", 120, tests.run_kernels),
    Part(
        "training tests", "Does training give DDP's results and the CPU's, over NCCL and Gloo?", 120, tests.run_others
    ),
    Part(
        "training step",
        "How long is a step of a GPT with 350 M parameters, and what does it hold?",
        120,
        of_shape("gpt-350m"),
    ),
    Part("kernels", "How much of the memory's bandwidth do kernels use?", 60, kernels.run),
    Part(
        "300 parameters",
        "What does a step cost the host?",
        40,
        of_shape("300 small", "DDP, fused AdamW", "stage 0", "stage 2"),
    ),
    Part(
        "2,000 parameters",
        "And with many parameters?",
        40,
        of_shape("2,000 small", "DDP, fused AdamW", "stage 0", "stage 2"),
    ),
    Part("sanitizer", "Do kernels stay in their arrays, without races?", 120, sanitizer.run),
    Part(
        "training step on all GPUs", "How long is it with several ranks?", 120, on_all_gpus("gpt-350m"), min_devices=2
    ),
    Part("overlap", "How much communication is hidden?", 240, several.run, min_devices=2),
)

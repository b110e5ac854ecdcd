"""How a recipe is started on many machines: a file for each kind of cluster. docs/recipes/at_scale.md says how to use them.

slurm_torchrun.sh  SLURM, one torchrun a node
slurm_srun.sh      SLURM, which starts every rank itself
jobset.yaml        Kubernetes, with JobSet
pytorchjob.yaml    Kubernetes, with Kubeflow's training operator
azure_ml.yaml      Azure Machine Learning
ray_train          Ray
"""

"""CV Factory: the stages that train, release, watch and retrain computer-vision models."""

__version__ = "0.1.0"

"""Models onto an endpoint: Amazon SageMaker's, or the compatible one of this machine."""

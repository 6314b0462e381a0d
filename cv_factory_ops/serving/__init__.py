"""One bundle behind SageMaker's container contract."""

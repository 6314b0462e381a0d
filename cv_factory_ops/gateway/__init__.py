"""What people and their programs talk to: ``cvf gateway`` in front of the endpoint."""

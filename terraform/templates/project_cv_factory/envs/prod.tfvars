environment         = "prod"
account_id          = "333333333333"
region              = "eu-central-1"
availability_zones  = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
interface_endpoints = ["ecr.api", "ecr.dkr", "logs", "sagemaker.api", "sagemaker.runtime", "secretsmanager", "sts"]

projects       = ["chest_xray"]
cluster_admins = { platform = "arn:aws:iam::333333333333:role/platform" }
node_groups = {
  general = { instance_types = ["m7i.xlarge"], least = 3, most = 9 }
  stages  = { instance_types = ["m7i.2xlarge", "m6i.2xlarge", "m7a.2xlarge"], least = 0, most = 12, spot = true, labels = { workload = "stages" } }
  # A training on spot goes on after its last epoch; the group beside it is for those that must not wait.
  gpu-spot = { instance_types = ["g5.12xlarge", "g6.12xlarge"], least = 0, most = 4, gpu = true, spot = true, labels = { accelerator = "gpu" } }
  gpu      = { instance_types = ["g5.12xlarge"], least = 0, most = 2, gpu = true, labels = { accelerator = "gpu" } }
}
database_class = "db.m7g.large"

monthly_usd = 12000
emails      = ["ml-platform@example.org", "on-call@example.org"]

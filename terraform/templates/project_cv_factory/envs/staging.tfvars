# As prod, but smaller, and an outage of a zone is not survived.
environment        = "staging"
account_id         = "222222222222"
region             = "eu-central-1"
availability_zones = ["eu-central-1a", "eu-central-1b"]
is_redundant       = false

projects       = ["chest_xray"]
cluster_admins = { platform = "arn:aws:iam::222222222222:role/platform" }
node_groups = {
  general = { instance_types = ["m7i.large"], least = 2, most = 6 }
  stages  = { instance_types = ["m7i.2xlarge", "m6i.2xlarge", "m7a.2xlarge"], least = 0, most = 6, spot = true, labels = { workload = "stages" } }
  gpu     = { instance_types = ["g5.xlarge", "g6.xlarge"], least = 0, most = 2, gpu = true, spot = true, labels = { accelerator = "gpu" } }
}

monthly_usd = 2000
emails      = ["ml-platform@example.org"]

environment        = "dev"
account_id         = "111111111111"
region             = "eu-central-1"
availability_zones = ["eu-central-1a", "eu-central-1b"]
is_redundant       = false
is_protected       = false

cluster_admins = { platform = "arn:aws:iam::111111111111:role/platform" }
node_groups = {
  general = { instance_types = ["m7i.large"], least = 2, most = 4 }
  llm     = { instance_types = ["g6e.2xlarge"], least = 0, most = 2, gpu = true, labels = { accelerator = "gpu" } }
}

monthly_usd = 800
emails      = ["ml-platform@example.org"]

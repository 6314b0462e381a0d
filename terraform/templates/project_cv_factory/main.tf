# One environment of CV Factory: where the stages run, where their storage lies, and a role for each component.

locals {
  name    = "${var.name}-${var.environment}"
  buckets = "${local.name}-${var.account_id}"
  # `storage` of the projects, and the folder of each.
  storage   = "${module.storage.arn}/cv-factory"
  endpoints = { for project in var.projects : project => replace(project, "_", "-") }
  secrets   = "arn:aws:secretsmanager:${var.region}:${var.account_id}:secret:${local.name}"
}

module "key" {
  source = "../../modules/kms_key"

  name        = local.name
  description = "Studies, bundles, captures, databases, logs and images of ${local.name}"
}

module "logs" {
  source = "../../modules/s3_bucket"

  name              = "${local.buckets}-logs"
  takes_access_logs = true
  expire            = { "s3/" = 365 }
  force_destroy     = !var.is_protected
}

module "storage" {
  source = "../../modules/s3_bucket"

  name          = "${local.buckets}-storage"
  kms_key_arn   = module.key.arn
  log_bucket    = module.logs.name
  expire        = { "airflow-logs/" = 90 }
  force_destroy = !var.is_protected
}

module "network" {
  source = "../../modules/network"

  name                = local.name
  cidr                = var.cidr
  availability_zones  = var.availability_zones
  single_nat_gateway  = !var.is_redundant
  interface_endpoints = var.interface_endpoints
  kms_key_arn         = module.key.arn
}

module "images" {
  source = "../../modules/ecr"

  name         = local.name
  repositories = [for image in ["airflow", "gateway", "inference", "mlflow", "monitoring", "trainer"] : "cv-factory-${image}"]
  kms_key_arn  = module.key.arn
  force_delete = !var.is_protected
}

module "cluster" {
  source = "../../modules/eks_cluster"

  name                = local.name
  subnet_ids          = module.network.private_subnet_ids
  kms_key_arn         = module.key.arn
  admin_role_arns     = var.cluster_admins
  public_access_cidrs = var.cluster_networks
  node_groups         = var.node_groups
  addons              = var.cluster_addons
}

module "airflow_database" {
  source = "../../modules/rds_postgres"

  name                = "${local.name}-airflow"
  database            = "airflow"
  vpc_id              = module.network.vpc_id
  subnet_ids          = module.network.private_subnet_ids
  clients             = { cluster = module.cluster.security_group_id }
  kms_key_arn         = module.key.arn
  instance_class      = var.database_class
  multi_az            = var.is_redundant
  deletion_protection = var.is_protected
}

module "mlflow" {
  source = "../../modules/mlflow_stack"

  name                = local.name
  bucket              = "${local.buckets}-mlflow"
  vpc_id              = module.network.vpc_id
  subnet_ids          = module.network.private_subnet_ids
  clients             = { cluster = module.cluster.security_group_id }
  kms_key_arn         = module.key.arn
  log_bucket          = module.logs.name
  issuer_arn          = module.cluster.issuer_arn
  issuer_url          = module.cluster.issuer_url
  instance_class      = var.database_class
  multi_az            = var.is_redundant
  deletion_protection = var.is_protected
}

module "endpoint" {
  source   = "../../modules/sagemaker_endpoint"
  for_each = local.endpoints

  name           = local.name
  endpoint       = each.value
  root           = "${local.storage}/${each.key}"
  repository_arn = module.images.arns["cv-factory-inference"]
  kms_key_arn    = module.key.arn
  vpc            = { id = module.network.vpc_id, subnet_ids = module.network.private_subnet_ids }
  topic_arn      = module.budgets_and_alarms.topic_arn
}

# docs/terraform.md tells which part of the code each of them runs; a test holds the code's AWS calls against it.
module "iam" {
  source = "../../modules/iam"

  name       = local.name
  issuer_arn = module.cluster.issuer_arn
  issuer_url = module.cluster.issuer_url
  components = {
    for component, access in local.access : component => merge(access, {
      subjects = [for account in lookup(var.service_accounts, component, local.accounts[component]) : "system:serviceaccount:${account}"]
      secrets  = concat(["${local.secrets}/${component}/*"], component == "airflow" ? [module.airflow_database.secret_arn] : [])
      keys     = concat([module.key.arn], contains(["stages", "rollout"], component) ? var.data_sources.keys : [])
    })
  }
}

locals {
  # A release of helm/cv-factory a project, named like its endpoint, and how that chart names its accounts.
  releases = {
    for endpoint in values(local.endpoints) : endpoint =>
    strcontains(endpoint, "cv-factory") ? endpoint : trimsuffix(substr("${endpoint}-cv-factory", 0, 40), "-")
  }
  accounts = {
    for component, names in {
      airflow = {
        airflow = ["airflow-api-server", "airflow-dag-processor", "airflow-scheduler", "airflow-triggerer", "airflow-worker"]
      }
      stages = {
        (var.namespace) = concat(["stages"], flatten([for name in values(local.releases) : ["${name}-drift", "${name}-batch"]]))
      }
      rollout   = { (var.namespace) = concat(["rollout"], [for name in values(local.releases) : "${name}-retraining"]) }
      gateway   = { (var.namespace) = [for name in values(local.releases) : "${name}-gateway"] }
      inference = { (var.namespace) = [for name in values(local.releases) : "${name}-inference"] }
      exporter  = { (var.namespace) = [for name in values(local.releases) : "${name}-exporter"] }
    } : component => flatten([for namespace, list in names : [for name in list : "${namespace}:${name}"]])
  }

  access = {
    airflow = {
      description = "Scheduler, workers and web server: records of the stages, own logs, connections"
      reads       = [local.storage]
      writes      = ["${module.storage.arn}/airflow-logs"]
    }
    stages = {
      description   = "Pods of all stages but those of a rollout, and the jobs drift and batch"
      reads         = var.data_sources.places
      writes        = [local.storage]
      session_hours = 12
    }
    rollout = {
      description   = "Pods of deploy, verify, evidence and promote, and the job retraining"
      reads         = var.data_sources.places
      writes        = [local.storage]
      rolls_out     = { for project, endpoint in local.endpoints : endpoint => module.endpoint[project].role_arn }
      session_hours = 12
    }
    gateway = {
      description = "Asks the endpoints, keeps late labels"
      adds        = [for project in var.projects : "${local.storage}/${project}/labels"]
      invokes     = values(local.endpoints)
    }
    inference = {
      description = "Serves a bundle in the cluster, and streams"
      reads       = [local.storage]
    }
    exporter = {
      description = "Metrics of models, from the records of the stages"
      reads       = [local.storage]
    }
  }
}

module "ci" {
  source = "../../modules/iam"
  count  = var.ci == null ? 0 : 1

  name       = local.name
  issuer_arn = var.ci.issuer_arn
  issuer_url = var.ci.issuer_url
  audience   = var.ci.audience
  components = {
    ci-images = {
      description = "CI: pushes images"
      subjects    = var.ci.subjects
      pushes      = values(module.images.arns)
    }
  }
}

module "budgets_and_alarms" {
  source = "../../modules/budgets_and_alarms"

  name        = local.name
  monthly_usd = var.monthly_usd
  emails      = var.emails
  cost_tag    = { key = "stack", value = local.name }
  kms_key_arn = module.key.arn
  databases   = { airflow = module.airflow_database.id, mlflow = module.mlflow.database_id }
}

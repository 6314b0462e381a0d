# Text models: trained on the cluster, tracked in MLflow, served by SageMaker. Airflow is one that is there already; its workers
# start the pods of the stages in this cluster.

locals {
  name      = "${var.name}-${var.environment}"
  buckets   = "${local.name}-${var.account_id}"
  storage   = "${module.storage.arn}/projects"
  endpoints = { for project in var.projects : project => replace(project, "_", "-") }
}

module "key" {
  source = "../../modules/kms_key"

  name        = local.name
  description = "Corpora, models and logs of ${local.name}"
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
  force_destroy = !var.is_protected
}

module "network" {
  source = "../../modules/network"

  name               = local.name
  availability_zones = var.availability_zones
  single_nat_gateway = !var.is_redundant
  kms_key_arn        = module.key.arn
}

module "images" {
  source = "../../modules/ecr"

  name         = local.name
  repositories = ["inference", "trainer"]
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
  multi_az            = var.is_redundant
  deletion_protection = var.is_protected
}

# Without a VPC: containers that see text alone need nothing of the network.
module "endpoint" {
  source   = "../../modules/sagemaker_endpoint"
  for_each = local.endpoints

  name           = local.name
  endpoint       = each.value
  root           = "${local.storage}/${each.key}"
  repository_arn = module.images.arns["inference"]
  kms_key_arn    = module.key.arn
  topic_arn      = module.budgets_and_alarms.topic_arn
}

module "iam" {
  source = "../../modules/iam"

  name       = local.name
  issuer_arn = module.cluster.issuer_arn
  issuer_url = module.cluster.issuer_url
  components = {
    stages = {
      description   = "Pods of the stages"
      subjects      = ["system:serviceaccount:${var.namespace}:stages"]
      writes        = [local.storage]
      keys          = [module.key.arn]
      session_hours = 12
    }
    rollout = {
      description   = "Pods that bring a model onto its endpoint"
      subjects      = ["system:serviceaccount:${var.namespace}:rollout"]
      writes        = [local.storage]
      keys          = [module.key.arn]
      rolls_out     = { for project, endpoint in local.endpoints : endpoint => module.endpoint[project].role_arn }
      session_hours = 12
    }
    gateway = {
      description = "Asks the endpoints"
      subjects    = ["system:serviceaccount:${var.namespace}:gateway"]
      invokes     = values(local.endpoints)
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
  databases   = { mlflow = module.mlflow.database_id }
}

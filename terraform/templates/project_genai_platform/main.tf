# Answers from documents: an indexer reads them and writes vectors to PostgreSQL (pgvector), a retriever finds them, a language
# model on the cluster's GPUs answers.

locals {
  name    = "${var.name}-${var.environment}"
  buckets = "${local.name}-${var.account_id}"
}

module "key" {
  source = "../../modules/kms_key"

  name        = local.name
  description = "Documents, vectors, models and logs of ${local.name}"
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
  repositories = ["indexer", "llm", "retriever"]
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

module "vectors" {
  source = "../../modules/rds_postgres"

  name                = "${local.name}-vectors"
  database            = "vectors"
  vpc_id              = module.network.vpc_id
  subnet_ids          = module.network.private_subnet_ids
  clients             = { cluster = module.cluster.security_group_id }
  kms_key_arn         = module.key.arn
  instance_class      = var.database_class
  multi_az            = var.is_redundant
  deletion_protection = var.is_protected
}

module "iam" {
  source = "../../modules/iam"

  name       = local.name
  issuer_arn = module.cluster.issuer_arn
  issuer_url = module.cluster.issuer_url
  components = {
    indexer = {
      description = "Reads documents, writes their vectors"
      subjects    = ["system:serviceaccount:${var.namespace}:indexer"]
      reads       = ["${module.storage.arn}/documents"]
      secrets     = [module.vectors.secret_arn]
      keys        = [module.key.arn]
    }
    retriever = {
      description = "Finds vectors and shows their documents"
      subjects    = ["system:serviceaccount:${var.namespace}:retriever"]
      reads       = ["${module.storage.arn}/documents"]
      secrets     = [module.vectors.secret_arn]
      keys        = [module.key.arn]
    }
    llm = {
      description = "Loads the language model's weights"
      subjects    = ["system:serviceaccount:${var.namespace}:llm"]
      reads       = ["${module.storage.arn}/models"]
      keys        = [module.key.arn]
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
  databases   = { vectors = module.vectors.id }
}

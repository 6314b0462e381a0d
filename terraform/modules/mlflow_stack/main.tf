# What an MLflow server on Kubernetes stands on: its artifacts, its database, its role. Clients come to the server for artifacts
# (--serve-artifacts), so nobody else needs the bucket.

module "artifacts" {
  source = "../s3_bucket"

  name          = var.bucket
  kms_key_arn   = var.kms_key_arn
  log_bucket    = var.log_bucket
  force_destroy = !var.deletion_protection
}

module "database" {
  source = "../rds_postgres"

  name                = "${var.name}-mlflow"
  database            = "mlflow"
  vpc_id              = var.vpc_id
  subnet_ids          = var.subnet_ids
  clients             = var.clients
  kms_key_arn         = var.kms_key_arn
  instance_class      = var.instance_class
  multi_az            = var.multi_az
  deletion_protection = var.deletion_protection
}

module "iam" {
  source = "../iam"

  name       = var.name
  issuer_arn = var.issuer_arn
  issuer_url = var.issuer_url
  components = {
    mlflow = {
      description = "MLflow server: its artifacts and its database's password"
      subjects    = ["system:serviceaccount:${var.service_account}"]
      writes      = [module.artifacts.arn]
      secrets     = [module.database.secret_arn]
      keys        = [var.kms_key_arn]
    }
  }
}

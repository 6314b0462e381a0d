output "storage" {
  description = "`storage` of the projects."
  value       = "s3://${module.storage.name}/cv-factory"
}

output "registry" {
  description = "What stands before the names of the images: `make push REGISTRY=...`."
  value       = trimsuffix(module.images.urls["cv-factory-gateway"], "cv-factory-gateway")
}

output "deploy" {
  description = "Project -> what its YAML's `deploy` says besides `inference` and `rollout`; the image's tag is to be added."
  value = {
    for project in var.projects : project => {
      kind     = "sagemaker"
      image    = module.images.urls["cv-factory-inference"]
      role_arn = module.endpoint[project].role_arn
      kms_key  = module.key.arn
      vpc      = module.endpoint[project].vpc
      tags     = { system = var.name, environment = var.environment, stack = local.name } # the budget counts by it
    }
  }
}

output "role_arns" {
  description = "Component -> role, the annotation `eks.amazonaws.com/role-arn` of its service accounts."
  value = merge(
    module.iam.role_arns,
    { mlflow = module.mlflow.role_arn, cluster-autoscaler = module.cluster.autoscaler_role_arn },
    var.ci == null ? {} : module.ci[0].role_arns,
  )
}

output "mlflow" {
  description = "What MLflow's server is started with."
  value       = module.mlflow.settings
}

output "airflow" {
  description = "Airflow's database, the folder of its logs, and what its secrets' names begin with."
  value = {
    database_host   = module.airflow_database.address
    database_name   = module.airflow_database.database
    database_secret = module.airflow_database.secret_arn
    remote_logs     = "s3://${module.storage.name}/airflow-logs"
    secrets_prefix  = "${local.name}/airflow"
  }
}

output "cluster" {
  description = "Name of the cluster: `aws eks update-kubeconfig --name ...`."
  value       = module.cluster.name
}

output "helm_values" {
  description = "Project -> values of helm/cv-factory, as YAML; the image's tag is to be added."
  value = {
    for project in var.projects : project => yamlencode(merge(
      {
        storage = "s3://${module.storage.name}/cv-factory"
        image   = { registry = trimsuffix(module.images.urls["cv-factory-gateway"], "/cv-factory-gateway") }
        env     = { AWS_DEFAULT_REGION = var.region }
      },
      {
        for component, role in {
          gateway    = "gateway"
          inference  = "inference"
          exporter   = "exporter"
          drift      = "stages"
          batch      = "stages"
          retraining = "rollout"
        } : component => { serviceAccount = { annotations = { "eks.amazonaws.com/role-arn" = module.iam.role_arns[role] } } }
      },
    ))
  }
}

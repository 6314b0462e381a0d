output "storage" {
  description = "Place of the projects."
  value       = "s3://${module.storage.name}/projects"
}

output "images" {
  description = "Image -> repository."
  value       = module.images.urls
}

output "role_arns" {
  description = "Component -> role, the annotation `eks.amazonaws.com/role-arn` of its service account."
  value       = merge(module.iam.role_arns, { mlflow = module.mlflow.role_arn, cluster-autoscaler = module.cluster.autoscaler_role_arn })
}

output "execution_role_arns" {
  description = "Project -> execution role of its endpoint's containers."
  value       = { for project, endpoint in module.endpoint : project => endpoint.role_arn }
}

output "mlflow" {
  description = "What MLflow's server is started with."
  value       = module.mlflow.settings
}

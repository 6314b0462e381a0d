output "storage" {
  description = "Bucket with `documents/` and `models/`."
  value       = "s3://${module.storage.name}"
}

output "images" {
  description = "Image -> repository."
  value       = module.images.urls
}

output "role_arns" {
  description = "Component -> role, the annotation `eks.amazonaws.com/role-arn` of its service account."
  value       = merge(module.iam.role_arns, { cluster-autoscaler = module.cluster.autoscaler_role_arn })
}

output "vectors" {
  description = "The database; its owner creates the extension once: CREATE EXTENSION vector."
  value = {
    host   = module.vectors.address
    name   = module.vectors.database
    secret = module.vectors.secret_arn
  }
}

output "name" {
  description = "Name of the cluster."
  value       = aws_eks_cluster.this.name
}

output "endpoint" {
  description = "Address of its API."
  value       = aws_eks_cluster.this.endpoint
}

output "security_group_id" {
  description = "Security group of its nodes and pods."
  value       = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
}

output "issuer_arn" {
  description = "IAM's OIDC provider of its service accounts."
  value       = aws_iam_openid_connect_provider.this.arn
}

output "issuer_url" {
  description = "Address of that provider."
  value       = local.issuer_url
}

output "autoscaler_role_arn" {
  description = "Role of the service account `kube-system:cluster-autoscaler`."
  value       = aws_iam_role.account["autoscaler"].arn
}

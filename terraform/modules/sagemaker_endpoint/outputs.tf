output "role_arn" {
  description = "Execution role, `deploy.role_arn`."
  value       = aws_iam_role.this.arn

  depends_on = [aws_iam_role_policy.this]
}

output "vpc" {
  description = "`deploy.vpc`; null where there is none."
  value = local.in_vpc ? {
    subnets         = var.vpc.subnet_ids
    security_groups = aws_security_group.this[*].id
  } : null
}

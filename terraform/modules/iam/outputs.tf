output "role_arns" {
  description = "Component -> ARN of its role."
  value       = { for name, role in aws_iam_role.this : name => role.arn }

  depends_on = [aws_iam_role_policy.this]
}

data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}
data "aws_region" "this" {}

locals {
  account   = data.aws_caller_identity.this.account_id
  partition = data.aws_partition.this.partition
  issuer    = trimprefix(var.issuer_url, "https://")
  here      = "${data.aws_region.this.name}:${local.account}"
  sagemaker = "arn:${local.partition}:sagemaker:${local.here}"

  # What each component may do, in IAM's words. A statement about no resource is left out.
  statements = {
    for name, component in var.components : name => [
      for statement in concat(
        local.storage[name], local.secrets[name], local.invocation[name], local.rollout[name], local.images[name]
      ) : statement if length(statement.Resource) > 0
    ]
  }

  storage = {
    for name, component in var.components : name => [
      {
        Sid    = "List"
        Effect = "Allow"
        Action = ["s3:ListBucket"]
        # Without a condition on the prefix: S3 would answer 403 instead of 404 for objects that are not there yet.
        Resource  = distinct([for place in concat(component.reads, component.writes) : split("/", place)[0]])
        Condition = {}
      },
      {
        Sid       = "Read"
        Effect    = "Allow"
        Action    = ["s3:GetObject"]
        Resource  = distinct([for place in concat(component.reads, component.writes) : "${place}/*"])
        Condition = {}
      },
      {
        Sid       = "Add"
        Effect    = "Allow"
        Action    = ["s3:PutObject", "s3:AbortMultipartUpload"]
        Resource  = distinct([for place in concat(component.adds, component.writes) : "${place}/*"])
        Condition = {}
      },
      {
        Sid       = "Remove"
        Effect    = "Allow"
        Action    = ["s3:DeleteObject"]
        Resource  = [for place in component.writes : "${place}/*"]
        Condition = {}
      },
      {
        Sid       = "Decrypt"
        Effect    = "Allow"
        Action    = ["kms:Decrypt"]
        Resource  = component.keys
        Condition = {}
      },
      {
        Sid       = "Encrypt"
        Effect    = "Allow"
        Action    = ["kms:GenerateDataKey"]
        Resource  = length(component.adds) + length(component.writes) > 0 ? component.keys : []
        Condition = {}
      },
    ]
  }

  secrets = {
    for name, component in var.components : name => [{
      Sid       = "Secrets"
      Effect    = "Allow"
      Action    = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
      Resource  = component.secrets
      Condition = {}
    }]
  }

  invocation = {
    for name, component in var.components : name => [{
      Sid       = "Invoke"
      Effect    = "Allow"
      Action    = ["sagemaker:InvokeEndpoint", "sagemaker:DescribeEndpoint"]
      Resource  = [for endpoint in component.invokes : "${local.sagemaker}:endpoint/${endpoint}"]
      Condition = {}
    }]
  }

  rollout = {
    for name, component in var.components : name => [
      {
        Sid    = "Models"
        Effect = "Allow"
        Action = ["sagemaker:CreateModel", "sagemaker:DescribeModel", "sagemaker:AddTags"]
        Resource = [
          for endpoint in keys(component.rolls_out) : "${local.sagemaker}:model/${endpoint}-*"
        ]
        Condition = {}
      },
      {
        Sid    = "EndpointConfigs"
        Effect = "Allow"
        # CreateEndpoint and UpdateEndpoint are asked about the config as well.
        Action = [
          "sagemaker:CreateEndpointConfig", "sagemaker:DescribeEndpointConfig", "sagemaker:CreateEndpoint",
          "sagemaker:UpdateEndpoint", "sagemaker:AddTags",
        ]
        Resource  = [for endpoint in keys(component.rolls_out) : "${local.sagemaker}:endpoint-config/${endpoint}-*"]
        Condition = {}
      },
      {
        Sid    = "Endpoints"
        Effect = "Allow"
        Action = [
          "sagemaker:CreateEndpoint", "sagemaker:DescribeEndpoint", "sagemaker:UpdateEndpoint", "sagemaker:DeleteEndpoint",
          "sagemaker:InvokeEndpoint", "sagemaker:InvokeEndpointAsync", "sagemaker:AddTags", "sagemaker:ListTags",
          "sagemaker:UpdateEndpointWeightsAndCapacities", # Application Auto Scaling asks for it of whoever registers a target
        ]
        Resource  = [for endpoint in keys(component.rolls_out) : "${local.sagemaker}:endpoint/${endpoint}"]
        Condition = {}
      },
      {
        Sid       = "ExecutionRoles"
        Effect    = "Allow"
        Action    = ["iam:PassRole"]
        Resource  = distinct(values(component.rolls_out))
        Condition = { StringEquals = { "iam:PassedToService" = "sagemaker.amazonaws.com" } }
      },
      {
        Sid    = "AlarmsOfARollout"
        Effect = "Allow"
        Action = ["cloudwatch:PutMetricAlarm", "cloudwatch:DeleteAlarms"]
        Resource = flatten([
          for endpoint in keys(component.rolls_out) : [
            "arn:${local.partition}:cloudwatch:${local.here}:alarm:cvf/${endpoint}/*",
            "arn:${local.partition}:cloudwatch:${local.here}:alarm:TargetTracking-endpoint/${endpoint}/*",
          ]
        ])
        Condition = {}
      },
      {
        Sid       = "AlarmsAreListedAll"
        Effect    = "Allow"
        Action    = ["cloudwatch:DescribeAlarms"]
        Resource  = length(component.rolls_out) > 0 ? ["arn:${local.partition}:cloudwatch:${local.here}:alarm:*"] : []
        Condition = {}
      },
      {
        Sid    = "Scaling"
        Effect = "Allow"
        Action = [
          "application-autoscaling:RegisterScalableTarget", "application-autoscaling:DeregisterScalableTarget",
          "application-autoscaling:PutScalingPolicy",
        ]
        # A target's ARN ends in an id that nobody knows before; the namespace is what can be named.
        Resource  = length(component.rolls_out) > 0 ? ["arn:${local.partition}:application-autoscaling:${local.here}:scalable-target/*"] : []
        Condition = { StringEquals = { "application-autoscaling:service-namespace" = "sagemaker" } }
      },
      {
        Sid       = "ScalingIsListedAll"
        Effect    = "Allow"
        Action    = ["application-autoscaling:DescribeScalableTargets"]
        Resource  = length(component.rolls_out) > 0 ? ["*"] : []
        Condition = {}
      },
      {
        Sid    = "ScalingsOwnRole"
        Effect = "Allow"
        Action = ["iam:CreateServiceLinkedRole"]
        Resource = length(component.rolls_out) > 0 ? [
          "arn:${local.partition}:iam::${local.account}:role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/*"
        ] : []
        Condition = { StringEquals = { "iam:AWSServiceName" = "sagemaker.application-autoscaling.amazonaws.com" } }
      },
      {
        Sid       = "KeysOfInstances"
        Effect    = "Allow"
        Action    = ["kms:CreateGrant", "kms:DescribeKey"]
        Resource  = length(component.rolls_out) > 0 ? component.keys : []
        Condition = { StringEquals = { "kms:ViaService" = "sagemaker.${data.aws_region.this.name}.amazonaws.com" } }
      },
    ]
  }

  images = {
    for name, component in var.components : name => [
      {
        Sid    = "Push"
        Effect = "Allow"
        Action = [
          "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:InitiateLayerUpload", "ecr:UploadLayerPart",
          "ecr:CompleteLayerUpload", "ecr:PutImage",
        ]
        Resource  = component.pushes
        Condition = {}
      },
      {
        Sid       = "LogIn"
        Effect    = "Allow"
        Action    = ["ecr:GetAuthorizationToken"] # knows no resource
        Resource  = length(component.pushes) > 0 ? ["*"] : []
        Condition = {}
      },
    ]
  }
}

resource "aws_iam_role" "this" {
  for_each = var.components

  name                 = "${var.name}-${each.key}"
  description          = each.value.description
  max_session_duration = each.value.session_hours * 3600
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Federated = var.issuer_arn }
      Action    = "sts:AssumeRoleWithWebIdentity"
      Condition = {
        StringEquals = {
          "${local.issuer}:sub" = each.value.subjects
          "${local.issuer}:aud" = var.audience
        }
      }
    }]
  })
}

resource "aws_iam_role_policy" "this" {
  for_each = var.components

  name = each.key
  role = aws_iam_role.this[each.key].id
  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [for statement in local.statements[each.key] : { for key, value in statement : key => value if !(key == "Condition" && length(value) == 0) }]
  })
}

# What an endpoint stands on and what outlives its rollouts. The endpoint itself, its models and configs, its scaling and the
# alarms that take a rollout back (`cvf/...`) are `cvf deploy`'s: it names them by content and moves them by canaries, and a plan
# that knew an older one would put that back.

data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}
data "aws_region" "this" {}

locals {
  in_vpc  = var.vpc != null
  account = data.aws_caller_identity.this.account_id
  ec2     = "arn:${data.aws_partition.this.partition}:ec2:${data.aws_region.this.name}:${local.account}"
  bucket  = split("/", var.root)[0]

  statements = [
    {
      Sid      = "Bundles"
      Effect   = "Allow"
      Action   = ["s3:GetObject"]
      Resource = ["${var.root}/models/*", "${var.root}/async/in/*"]
    },
    {
      Sid      = "CapturesAndAnswers"
      Effect   = "Allow"
      Action   = ["s3:PutObject", "s3:AbortMultipartUpload"]
      Resource = ["${var.root}/captures/*", "${var.root}/async/out/*", "${var.root}/async/failed/*"]
    },
    {
      Sid      = "List"
      Effect   = "Allow"
      Action   = ["s3:ListBucket"]
      Resource = [local.bucket]
    },
    {
      Sid      = "Keys"
      Effect   = "Allow"
      Action   = ["kms:Decrypt", "kms:GenerateDataKey"]
      Resource = [var.kms_key_arn]
    },
    {
      Sid      = "Image"
      Effect   = "Allow"
      Action   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
      Resource = [var.repository_arn]
    },
    {
      Sid      = "LogIn"
      Effect   = "Allow"
      Action   = ["ecr:GetAuthorizationToken"] # knows no resource
      Resource = ["*"]
    },
    {
      Sid      = "Logs"
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"]
      Resource = ["${aws_cloudwatch_log_group.this.arn}:*"]
    },
    {
      Sid       = "Metrics"
      Effect    = "Allow"
      Action    = ["cloudwatch:PutMetricData"] # knows no resource
      Resource  = ["*"]
      Condition = { StringLike = { "cloudwatch:namespace" = ["AWS/SageMaker", "/aws/sagemaker/*"] } }
    },
  ]

  # https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html, CreateModel with a VPC
  network_statements = [
    {
      Sid    = "NetworkInterfaces"
      Effect = "Allow"
      Action = [
        "ec2:CreateNetworkInterface", "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface",
        "ec2:DeleteNetworkInterfacePermission",
      ]
      Resource = concat(
        ["${local.ec2}:network-interface/*"],
        [for subnet in(local.in_vpc ? var.vpc.subnet_ids : []) : "${local.ec2}:subnet/${subnet}"],
        [for group in aws_security_group.this : group.arn],
      )
    },
    {
      Sid    = "NetworkIsLookedAt"
      Effect = "Allow"
      Action = [ # know no resource
        "ec2:DescribeDhcpOptions", "ec2:DescribeNetworkInterfaces", "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets",
        "ec2:DescribeVpcs",
      ]
      Resource = ["*"]
    },
  ]
}

resource "aws_iam_role" "this" {
  name        = "${var.name}-${var.endpoint}"
  description = "Containers of the endpoint ${var.endpoint}"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "sagemaker.amazonaws.com" }
      Action    = "sts:AssumeRole"
      Condition = { StringEquals = { "aws:SourceAccount" = local.account } }
    }]
  })
}

resource "aws_iam_role_policy" "this" {
  name = "serve"
  role = aws_iam_role.this.id
  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = concat(local.statements, [for statement in local.network_statements : statement if local.in_vpc])
  })
}

# SageMaker would make it itself, without a key and for ever.
resource "aws_cloudwatch_log_group" "this" {
  name              = "/aws/sagemaker/Endpoints/${var.endpoint}"
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
}

# Containers are asked by SageMaker, not over the network, so nothing comes in.
resource "aws_security_group" "this" {
  #checkov:skip=CKV2_AWS_5:SageMaker attaches it, as deploy.vpc.security_groups says
  count = local.in_vpc ? 1 : 0

  name        = "${var.name}-${var.endpoint}"
  description = "Containers of the endpoint ${var.endpoint}"
  vpc_id      = var.vpc.id
  tags        = { Name = "${var.name}-${var.endpoint}" }
}

resource "aws_vpc_security_group_egress_rule" "https" {
  count = local.in_vpc ? 1 : 0

  security_group_id = aws_security_group.this[0].id
  description       = "HTTPS to S3, ECR and CloudWatch"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

# They tell people, all the year; those of a rollout take it back.
resource "aws_cloudwatch_metric_alarm" "this" {
  for_each = {
    errors  = { metric = "Invocation5XXErrors", statistic = "Sum", percentile = null, threshold = 0 }
    latency = { metric = "ModelLatency", statistic = null, percentile = "p99", threshold = var.latency_ms * 1000 } # microseconds
  }

  alarm_name          = "${var.name}-${var.endpoint}-${each.key}"
  alarm_description   = "Endpoint ${var.endpoint}: ${each.value.metric} above ${each.value.threshold} for fifteen minutes"
  namespace           = "AWS/SageMaker"
  metric_name         = each.value.metric
  dimensions          = { EndpointName = var.endpoint, VariantName = "AllTraffic" }
  statistic           = each.value.statistic
  extended_statistic  = each.value.percentile
  threshold           = each.value.threshold
  comparison_operator = "GreaterThanThreshold"
  period              = 300
  evaluation_periods  = 3
  treat_missing_data  = "notBreaching"
  alarm_actions       = [var.topic_arn]
  ok_actions          = [var.topic_arn]
}

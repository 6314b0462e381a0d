{{- /* Names are cut so that a CronJob's, the longest that is made of them, has at most its 52 characters. */ -}}
{{- define "cv-factory.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $long := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $fullname := default $long .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" $fullname) -}}
{{- fail (printf "fullnameOverride: services cannot be named %q; give a name of a-z, 0-9 and -, with a letter first" $fullname) -}}
{{- end -}}
{{- $fullname -}}
{{- end -}}

{{- /* The other templates take (dict "root" $ "name" <component>): a component is a key of the values. */ -}}
{{- define "cv-factory.component" -}}
{{ include "cv-factory.fullname" .root }}-{{ .name }}
{{- end -}}

{{- define "cv-factory.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{- define "cv-factory.labels" -}}
{{ include "cv-factory.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: cv-factory
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "cv-factory.serviceAccount" -}}
{{- $account := (index .root.Values .name).serviceAccount -}}
{{- $own := ternary (include "cv-factory.component" .) "default" $account.create -}}
{{- default $own $account.name -}}
{{- end -}}

{{- define "cv-factory.image" -}}
{{- $image := (index .root.Values .name).image -}}
{{- $all := .root.Values.image -}}
{{- with $all.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ coalesce $image.tag $all.tag .root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- /* The project as YAML with its name and storage; what is missing is told in one line. */ -}}
{{- define "cv-factory.project" -}}
{{- $project := required "project: give the project's YAML: --set-file project=configs/demo.yaml" .Values.project | fromYaml -}}
{{- with $project.Error }}{{ fail (printf "project: is not YAML: %s" .) }}{{ end -}}
{{- if not $project.project }}{{ fail "project: names no project" }}{{ end -}}
{{- $storage := default $project.storage .Values.storage | default "" | trimSuffix "/" -}}
{{- if not (regexMatch "^(s3://|file:///|/)" $storage) -}}
{{- fail (printf "storage: %q given; allowed: s3://bucket/prefix, or a path on a volume of extraVolumes" $storage) -}}
{{- end -}}
{{- dict "name" $project.project "storage" $storage | toYaml -}}
{{- end -}}

{{- /* Refuses a project whose file of keys the gateway's pod would not have: it would be started again and again. */ -}}
{{- define "cv-factory.requireKeys" -}}
{{- $access := default dict ((.Values.project | fromYaml).gateway).access -}}
{{- if and (eq (default "api_keys" $access.kind) "api_keys") (not $access.env) -}}
{{- $file := default "var/gateway-keys.jsonl" $access.file -}}
{{- $folders := list -}}
{{- if .Values.gateway.keysSecret }}{{ $folders = list "/etc/cv-factory/keys" }}{{ end -}}
{{- range .Values.extraVolumeMounts }}{{ $folders = append $folders (trimSuffix "/" .mountPath) }}{{ end -}}
{{- $found := false -}}
{{- range $folders }}{{ if hasPrefix (printf "%s/" .) $file }}{{ $found = true }}{{ end }}{{ end -}}
{{- if not $found -}}
{{- fail (printf "project: gateway.access.file is %q, which no pod has; give gateway.keysSecret and the file /etc/cv-factory/keys/gateway-keys.jsonl, or a file below extraVolumeMounts" $file) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Fields that the pods of all components have. */ -}}
{{- define "cv-factory.pod" -}}
{{- $own := index .root.Values .name -}}
serviceAccountName: {{ include "cv-factory.serviceAccount" . | quote }}
automountServiceAccountToken: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- range $field := list "nodeSelector" "affinity" "tolerations" }}
{{- with index $own $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Fields that all containers have. The release's variables are overridden by the component's. */ -}}
{{- define "cv-factory.container" -}}
{{- $own := index .root.Values .name -}}
image: {{ include "cv-factory.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
{{- with default .root.Values.existingSecret $own.existingSecret }}
envFrom:
  - secretRef: {name: {{ . | quote }}}
{{- end }}
{{- end -}}

{{- define "cv-factory.env" -}}
{{- $project := include "cv-factory.project" .root | fromYaml -}}
{{- $env := dict "CVF_HOME" "/tmp" "CVF_STORAGE" $project.storage -}}
{{- with .root.Values.mlflow.trackingUri }}{{ $_ := set $env "MLFLOW_TRACKING_URI" . }}{{ end -}}
{{- if .root.Values.endpoint.enabled -}}
{{- $endpoint := include "cv-factory.component" (dict "root" .root "name" "endpoint") -}}
{{- $_ := set $env "AWS_ENDPOINT_URL_SAGEMAKER" (printf "http://%s:%v" $endpoint .root.Values.endpoint.service.port) -}}
{{- end -}}
{{- range $name, $value := mergeOverwrite $env (deepCopy (default dict .root.Values.env)) (deepCopy (default dict (index .root.Values .name).env)) }}
- {name: {{ $name | quote }}, value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}}
{{- end }}
{{- end -}}

{{- define "cv-factory.volumeMounts" -}}
- {name: scratch, mountPath: /tmp}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "cv-factory.volumes" -}}
- name: scratch
  emptyDir: {sizeLimit: {{ (index .root.Values .name).scratch }}}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Of pods that read the project: another one is another checksum, so they are replaced. */ -}}
{{- define "cv-factory.projectChecksum" -}}
checksum/project: {{ sha256sum .root.Values.project }}
{{- end -}}

{{- define "cv-factory.projectMount" -}}
- {name: project, mountPath: /etc/cv-factory/config, readOnly: true}
{{- end -}}

{{- define "cv-factory.projectVolume" -}}
- name: project
  configMap: {name: {{ include "cv-factory.fullname" .root | quote }}}
{{- end -}}

{{- /* What a server that answers HTTP at a path has: time for who routes to it to stop, then for requests in hand. */ -}}
{{- define "cv-factory.probes" -}}
startupProbe:
  httpGet: {path: {{ .path }}, port: http}
  periodSeconds: 5
  failureThreshold: 60
readinessProbe:
  httpGet: {path: {{ .path }}, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: {{ .path }}, port: http}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
lifecycle:
  preStop: {exec: {command: [sleep, "5"]}}
{{- end -}}

{{- define "cv-factory.service" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "cv-factory.component" . }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "cv-factory.labels" . | nindent 4 }}
  {{- with (index .root.Values .name).service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  type: {{ (index .root.Values .name).service.type }}
  selector:
    {{- include "cv-factory.selectorLabels" . | nindent 4 }}
  ports:
    - {name: http, port: {{ (index .root.Values .name).service.port }}, targetPort: http}
{{- end -}}

{{- /* A CronJob around one container; "command" is the list that it runs. JOB is the same for each try of a job. */ -}}
{{- define "cv-factory.cronjob" -}}
{{- $own := index .root.Values .name -}}
{{- $project := include "cv-factory.project" .root | fromYaml -}}
{{- $isModern := semverCompare ">=1.27-0" .root.Capabilities.KubeVersion.Version -}}
{{- /* batch/v1 is older than its CronJob; without a cluster no kinds are known, but a version is. */ -}}
{{- $isStable := or (.root.Capabilities.APIVersions.Has "batch/v1/CronJob") (semverCompare ">=1.21-0" .root.Capabilities.KubeVersion.Version) -}}
apiVersion: {{ ternary "batch/v1" "batch/v1beta1" $isStable }}
kind: CronJob
metadata:
  name: {{ include "cv-factory.component" . }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "cv-factory.labels" . | nindent 4 }}
spec:
  schedule: {{ $own.schedule | quote }}
  {{- if $isModern }}
  timeZone: {{ $own.timeZone | quote }}
  {{- end }}
  concurrencyPolicy: Forbid
  startingDeadlineSeconds: 3600
  jobTemplate:
    metadata:
      labels:
        {{- include "cv-factory.labels" . | nindent 8 }}
    spec:
      backoffLimit: 3
      activeDeadlineSeconds: {{ int $own.activeDeadlineSeconds }}
      {{- if $isModern }}
      podFailurePolicy: # what the exit codes say: 2, 3 and 4 would be the same again, 75 is tried again
        rules:
          - action: FailJob
            onExitCodes: {operator: In, values: [2, 3, 4]}
            onPodConditions: [] # up to 1.30 the API's schema asks for it
      {{- end }}
      template:
        metadata:
          labels:
            {{- include "cv-factory.selectorLabels" . | nindent 12 }}
          {{- with $own.podAnnotations }}
          annotations:
            {{- toYaml . | nindent 12 }}
          {{- end }}
        spec:
          restartPolicy: Never
          terminationGracePeriodSeconds: 30
          {{- include "cv-factory.pod" . | nindent 10 }}
          containers:
            - name: {{ .name }}
              {{- include "cv-factory.container" . | nindent 14 }}
              resources:
                {{- toYaml $own.resources | nindent 16 }}
              command:
                {{- toYaml .command | nindent 16 }}
              env:
                - name: JOB
                  valueFrom: {fieldRef: {fieldPath: "metadata.labels['job-name']"}}
                - {name: PROJECT, value: /etc/cv-factory/config/project.yaml}
                - {name: RUNS, value: {{ printf "%s/%s/runs" $project.storage $project.name | quote }}}
                {{- include "cv-factory.env" . | trim | nindent 16 }}
              volumeMounts:
                {{- include "cv-factory.projectMount" . | nindent 16 }}
                {{- include "cv-factory.volumeMounts" . | nindent 16 }}
                - {name: shared-memory, mountPath: /dev/shm}
          volumes:
            {{- include "cv-factory.projectVolume" . | nindent 12 }}
            {{- include "cv-factory.volumes" . | nindent 12 }}
            - name: shared-memory
              emptyDir: {medium: Memory, sizeLimit: {{ $own.sharedMemory }}}
{{- end -}}

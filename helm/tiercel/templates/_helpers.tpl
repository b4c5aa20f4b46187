{{- define "tiercel.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "tiercel.labels" -}}
app.kubernetes.io/name: tiercel
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tiercel.selector" -}}
app.kubernetes.io/name: tiercel
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "tiercel.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .fallback }}
{{- end -}}
{{- end -}}

{{- define "tiercel.claim" -}}
{{- .Values.variants.existingClaim | default (printf "%s-variants" (include "tiercel.name" .)) -}}
{{- end -}}

{{- define "tiercel.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "tiercel.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/* A pool with the defaults of `engine` for what it leaves out. */}}
{{- define "tiercel.pool" -}}
{{- mergeOverwrite (deepCopy .root.Values.engine) (deepCopy (.pool | default dict)) | toYaml -}}
{{- end -}}

{{- define "tiercel.poolName" -}}
{{- printf "%s-%s" (include "tiercel.name" .root) (.variant | lower | replace "." "-" | replace "_" "-") | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* What no schema can say. Every sentence names the value and the fix. */}}
{{- define "tiercel.check" -}}
{{- if not (hasKey .Values.pools .Values.model.reference) -}}
{{- fail (printf "pools: has no pool for the reference %q; add it, or set model.reference to one of: %s" .Values.model.reference (keys .Values.pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- range $field := list "model" "reference" "variants_dir" "serve" "pools" "run_dir" -}}
{{- if hasKey $.Values.gateway.config $field -}}
{{- fail (printf "gateway.config.%s: is written by the chart; remove it and use model, variants and pools" $field) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.gateway.config.keys -}}
{{- fail "gateway.config.keys: is empty, and a gateway in a cluster can be reached by others; `tiercel keys new NAME` makes a key and prints its lines" -}}
{{- end -}}
{{- if and (hasKey (.Values.gateway.config.watch | default dict) "store") -}}
{{- fail "gateway.config.watch.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret and name it in watch.storeSecret" -}}
{{- end -}}
{{- $several := or (gt (int .Values.gateway.replicas) 1) .Values.gateway.autoscaling.enabled -}}
{{- if and $several (not .Values.watch.storeSecret.name) -}}
{{- fail (printf "gateway.replicas: several gateways must share what the watch knows; put a database's URL into a secret and name it in watch.storeSecret, or set gateway.replicas to 1") -}}
{{- end -}}
{{- if and .Values.gateway.autoscaling.enabled (gt (int .Values.gateway.autoscaling.minReplicas) (int .Values.gateway.autoscaling.maxReplicas)) -}}
{{- fail (printf "gateway.autoscaling.minReplicas: %d is above maxReplicas %d; lower it" (int .Values.gateway.autoscaling.minReplicas) (int .Values.gateway.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.host: is empty; give the name under which the gateway is reached" -}}
{{- end -}}
{{- range $variant, $given := .Values.pools -}}
{{- $pool := include "tiercel.pool" (dict "root" $ "pool" $given) | fromYaml -}}
{{- $ranks := mul (int $pool.tensorParallel) (int $pool.pipelineParallel) -}}
{{- if and (gt (int $pool.gpus) 0) (ne (int $pool.gpus) (int $ranks)) -}}
{{- fail (printf "pools.%s.gpus: is %d, but tensorParallel %d x pipelineParallel %d are %d ranks; make them equal" $variant (int $pool.gpus) (int $pool.tensorParallel) (int $pool.pipelineParallel) (int $ranks)) -}}
{{- end -}}
{{- if and $pool.autoscaling.enabled (hasKey ($given | default dict) "replicas") -}}
{{- fail (printf "pools.%s.replicas: is fixed, and autoscaling is on; remove one of them" $variant) -}}
{{- end -}}
{{- if and $pool.autoscaling.enabled (not $pool.autoscaling.prometheus) -}}
{{- fail (printf "pools.%s.autoscaling.prometheus: is empty; give Prometheus' address, such as http://prometheus.monitoring:9090" $variant) -}}
{{- end -}}
{{- if and $pool.autoscaling.enabled (gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) -}}
{{- fail (printf "pools.%s.autoscaling.minReplicas: %d is above maxReplicas %d; lower it" $variant (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- range $name, $role := .Values.gateway.config.roles -}}
{{- with ($role | default dict).canary -}}
{{- if not (hasKey $.Values.pools .variant) -}}
{{- fail (printf "gateway.config.roles.%s.canary.variant: %q has no pool; add one, or use one of: %s" $name .variant (keys $.Values.pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* tiercel.yaml, whole. */}}
{{- define "tiercel.config" -}}
{{- $config := deepCopy .Values.gateway.config -}}
{{- $_ := set $config "model" (dict "name" .Values.model.name "path" (printf "/variants/%s/current" .Values.model.reference)) -}}
{{- $_ := set $config "reference" .Values.model.reference -}}
{{- $_ := set $config "variants_dir" "/variants" -}}
{{- $_ := set $config "run_dir" "/run/tiercel" -}}
{{- $_ := set $config "serve" (keys .Values.pools | sortAlpha) -}}
{{- $pools := dict -}}
{{- range $variant, $_ := .Values.pools -}}
{{- $url := printf "dns+http://%s.%s.svc:8000" (include "tiercel.poolName" (dict "root" $ "variant" $variant)) $.Release.Namespace -}}
{{- $_ := set $pools $variant (list $url) -}}
{{- end -}}
{{- $_ := set $config "pools" $pools -}}
{{- $gateway := merge (dict "host" "0.0.0.0" "port" 8080) ($config.gateway | default dict) -}}
{{- $_ := set $gateway "shutdown_timeout_s" (int .Values.gateway.longestStreamSeconds) -}}
{{- $_ := set $config "gateway" $gateway -}}
{{- if .Values.watch.storeSecret.name -}}
{{- $_ := set $config "watch" (merge (dict "store_env" "TIERCEL_WATCH_STORE") ($config.watch | default dict)) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

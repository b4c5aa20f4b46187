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

{{- define "tiercel.modelsClaim" -}}
{{- .Values.quantize.models.existingClaim | default (printf "%s-models" (include "tiercel.name" .)) -}}
{{- end -}}

{{/* The volume of the variants, for those who read it. */}}
{{- define "tiercel.variantsVolume" -}}
- name: variants
  {{- if .Values.variants.image.reference }}
  image: {{- toYaml .Values.variants.image | nindent 4 }}
  {{- else }}
  persistentVolumeClaim: { claimName: {{ include "tiercel.claim" . }}, readOnly: true }
  {{- end }}
{{- end -}}

{{- define "tiercel.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# Weights are many and large: their owner is changed only where it is another.
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "tiercel.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/* Waits until the cards of the given variants are there, so that a pod does not fail before the job has ended. */}}
{{- define "tiercel.waitForCards" -}}
- name: wait-for-cards
  image: {{ .image | quote }}
  imagePullPolicy: {{ .pullPolicy }}
  command:
    - sh
    - -c
    - |
      for variant in {{ .variants | sortAlpha | join " " }}; do
        until [ -e "/variants/$variant/current/card.json" ]; do
          echo "waiting for /variants/$variant/current/card.json"
          sleep 5
        done
      done
  securityContext: {{- include "tiercel.containerSecurity" . | nindent 4 }}
  resources:
    requests: { cpu: 10m, memory: 16Mi }
    limits: { memory: 64Mi }
  volumeMounts:
    - { name: variants, mountPath: /variants, readOnly: true }
{{- end -}}

{{/* What places a pod. */}}
{{- define "tiercel.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "tiercel.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A pool with the defaults of `engine` for what it leaves out. */}}
{{- define "tiercel.pool" -}}
{{- mergeOverwrite (deepCopy .root.Values.engine) (deepCopy (.pool | default dict)) | toYaml -}}
{{- end -}}

{{- define "tiercel.poolName" -}}
{{- printf "%s-%s" (include "tiercel.name" .root) (.variant | lower | replace "." "-" | replace "_" "-") | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* What no schema can say. Every sentence names the field, the value and the fix. */}}
{{- define "tiercel.check" -}}
{{- if not .Values.pools -}}
{{- fail (printf "pools: is empty; give a pool per variant, at least the reference's: { %s: {} }" .Values.model.reference) -}}
{{- end -}}
{{- if not .Values.gateway.config.roles -}}
{{- fail "gateway.config.roles: is empty; give at least one, such as core: { budget: { min_weight_bits: 16 } }" -}}
{{- end -}}
{{- range $where, $image := dict "gateway" .Values.gateway.image "quantize" .Values.quantize.image -}}
{{- if and (eq $image.tag "latest") (not $image.digest) -}}
{{- fail (printf "%s.image.tag: \"latest\" is another image tomorrow; give a version or a digest" $where) -}}
{{- end -}}
{{- end -}}
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
{{- with .Values.gateway.config.default_role -}}
{{- if not (hasKey $.Values.gateway.config.roles .) -}}
{{- fail (printf "gateway.config.default_role: %q is not a role; use one of: %s" . (keys $.Values.gateway.config.roles | sortAlpha | join ", ")) -}}
{{- end -}}
{{- else -}}
{{- fail "gateway.config.default_role: is empty; name the role of requests that name none" -}}
{{- end -}}
{{- $watch := .Values.gateway.config.watch | default dict -}}
{{- if $watch.store -}}
{{- fail "gateway.config.watch.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret and name it in watch.storeSecret" -}}
{{- end -}}
{{- if (.Values.gateway.config.responses | default dict).store -}}
{{- fail "gateway.config.responses.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret, name it in watch.storeSecret or gateway.extraEnv, and the variable in gateway.config.responses.store_env (TIERCEL_WATCH_STORE is watch.storeSecret's)" -}}
{{- end -}}
{{- $several := or (gt (int .Values.gateway.replicas) 1) .Values.gateway.autoscaling.enabled -}}
{{- $watched := ne (toString $watch.enabled) "false" -}}
{{- if and $several $watched (not .Values.watch.storeSecret.name) -}}
{{- fail "gateway.replicas: several gateways must share what the watch knows; put a database's URL into a secret and name it in watch.storeSecret, or set gateway.replicas to 1 and gateway.autoscaling.enabled to false" -}}
{{- end -}}
{{- if and .Values.gateway.autoscaling.enabled (gt (int .Values.gateway.autoscaling.minReplicas) (int .Values.gateway.autoscaling.maxReplicas)) -}}
{{- fail (printf "gateway.autoscaling.minReplicas: %d is above maxReplicas %d; lower it" (int .Values.gateway.autoscaling.minReplicas) (int .Values.gateway.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.host: is empty; give the name under which the gateway is reached" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs: is empty; name the Gateway that the route belongs to" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled .Values.gateway.tlsSecret -}}
{{- fail (printf "httpRoute.enabled: is true, and the gateway speaks HTTPS itself (gateway.tlsSecret %q); let the Gateway end TLS and empty gateway.tlsSecret" .Values.gateway.tlsSecret) -}}
{{- end -}}
{{- if and .Values.variants.existingClaim .Values.variants.image.reference -}}
{{- fail (printf "variants.image.reference: %q and variants.existingClaim %q both say where the variants are; empty one" .Values.variants.image.reference .Values.variants.existingClaim) -}}
{{- end -}}
{{- if and (or .Values.variants.image.reference (and .Values.quantize.enabled .Values.quantize.model.image.reference)) (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "image volumes need Kubernetes 1.31, and this is %s; use a claim" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- $names := dict -}}
{{- range $variant, $given := .Values.pools -}}
{{- $name := include "tiercel.poolName" (dict "root" $ "variant" $variant) -}}
{{- if hasKey $names $name -}}
{{- fail (printf "pools.%s: would be called %s as pools.%s is; rename one of the variants" $variant $name (get $names $name)) -}}
{{- end -}}
{{- $_ := set $names $name $variant -}}
{{- $pool := include "tiercel.pool" (dict "root" $ "pool" $given) | fromYaml -}}
{{- if and (eq $pool.image.tag "latest") (not $pool.image.digest) -}}
{{- fail (printf "pools.%s.image.tag: \"latest\" is another image tomorrow; give a version or a digest" $variant) -}}
{{- end -}}
{{- $ranks := mul (int $pool.tensorParallel) (int $pool.pipelineParallel) -}}
{{- $gpus := mul (int $pool.gpus) (int $pool.nodes) -}}
{{- if and (gt (int $pool.gpus) 0) (ne $gpus $ranks) -}}
{{- if gt (int $pool.nodes) 1 -}}
{{- fail (printf "pools.%s.gpus: is %d on each of %d nodes, but tensorParallel %d x pipelineParallel %d are %d ranks; make them equal" $variant (int $pool.gpus) (int $pool.nodes) (int $pool.tensorParallel) (int $pool.pipelineParallel) (int $ranks)) -}}
{{- else -}}
{{- fail (printf "pools.%s.gpus: is %d, but tensorParallel %d x pipelineParallel %d are %d ranks; make them equal" $variant (int $pool.gpus) (int $pool.tensorParallel) (int $pool.pipelineParallel) (int $ranks)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq (int $pool.gpus) 0) (gt (int $pool.nodes) 1) -}}
{{- fail (printf "pools.%s.nodes: is %d, and a CPU engine (gpus 0) is one pod; set it to 1" $variant (int $pool.nodes)) -}}
{{- end -}}
{{- if and (eq (int $pool.gpus) 0) (eq $pool.image.repository "vllm/vllm-openai") -}}
{{- fail (printf "pools.%s.image.repository: %q is vLLM's image for GPUs, and gpus is 0; name a CPU image" $variant $pool.image.repository) -}}
{{- end -}}
{{- if $pool.autoscaling.enabled -}}
{{- if hasKey ($given | default dict) "replicas" -}}
{{- fail (printf "pools.%s.replicas: is fixed, and autoscaling is on; remove one of them" $variant) -}}
{{- end -}}
{{- if not $pool.autoscaling.prometheus -}}
{{- fail (printf "pools.%s.autoscaling.prometheus: is empty; give Prometheus' address, such as http://prometheus.monitoring:9090" $variant) -}}
{{- end -}}
{{- if gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas) -}}
{{- fail (printf "pools.%s.autoscaling.minReplicas: %d is above maxReplicas %d; lower it" $variant (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $variant $.Values.model.reference) (eq (int $pool.autoscaling.minReplicas) 0) -}}
{{- fail (printf "pools.%s.autoscaling.minReplicas: is 0, and the reference is what requests go up to when another pool is down; set it to 1" $variant) -}}
{{- end -}}
{{- end -}}
{{- if and $pool.inferencePool.enabled (not $pool.inferencePool.endpointPicker) -}}
{{- fail (printf "pools.%s.inferencePool.endpointPicker: is empty; name the service of the endpoint picker" $variant) -}}
{{- end -}}
{{- end -}}
{{- range $name, $role := .Values.gateway.config.roles -}}
{{- with ($role | default dict).canary -}}
{{- if not (hasKey $.Values.pools .variant) -}}
{{- fail (printf "gateway.config.roles.%s.canary.variant: %q has no pool; add one, or use one of: %s" $name .variant (keys $.Values.pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.quantize.enabled -}}
{{- $model := .Values.quantize.model -}}
{{- $sources := 0 -}}
{{- range $source := list $model.huggingFace.repo $model.existingClaim $model.image.reference -}}
{{- if $source -}}{{- $sources = add1 $sources -}}{{- end -}}
{{- end -}}
{{- if ne (int $sources) 1 -}}
{{- fail (printf "quantize.model: has %d sources; give one of huggingFace.repo, existingClaim and image.reference" (int $sources)) -}}
{{- end -}}
{{- if .Values.variants.image.reference -}}
{{- fail (printf "quantize.enabled: is true, and the variants are an image (%q), which nobody can write to; empty variants.image.reference" .Values.variants.image.reference) -}}
{{- end -}}
{{- if not (or .Values.quantize.make .Values.quantize.plan) -}}
{{- fail "quantize.make: is empty, and so is quantize.plan; name what the job is to make" -}}
{{- end -}}
{{- $made := concat (list .Values.model.reference) .Values.quantize.make -}}
{{- range .Values.quantize.plan -}}{{- $made = append $made .name -}}{{- end -}}
{{- if not .Values.variants.existingClaim -}}
{{- range $variant, $_ := .Values.pools -}}
{{- if not (has $variant $made) -}}
{{- fail (printf "pools.%s: nobody makes it: the claim is new, and the job makes %s; add it to quantize.make or quantize.plan, or remove the pool" $variant (join ", " $made)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Configurations are written as JSON, which is YAML: Helm's numbers are floats, and its YAML writes a million as
     1e+06, which is a string to other readers. */}}
{{/* What the configurations of the gateway and of the job have in common. */}}
{{- define "tiercel.baseConfig" -}}
{{- $config := deepCopy .Values.gateway.config -}}
{{- $_ := set $config "reference" .Values.model.reference -}}
{{- $_ := set $config "variants_dir" "/variants" -}}
{{- $_ := set $config "run_dir" "/run/tiercel" -}}
{{- $_ := set $config "serve" (keys .Values.pools | sortAlpha) -}}
{{- toJson $config -}}
{{- end -}}

{{/* tiercel.yaml, whole. */}}
{{- define "tiercel.config" -}}
{{- $config := include "tiercel.baseConfig" . | fromJson -}}
{{- $_ := set $config "model" (dict "name" .Values.model.name "path" (printf "/variants/%s/current" .Values.model.reference)) -}}
{{- $pools := dict -}}
{{- range $variant, $_ := .Values.pools -}}
{{- $url := printf "dns+http://%s.%s.svc:8000" (include "tiercel.poolName" (dict "root" $ "variant" $variant)) $.Release.Namespace -}}
{{- $_ := set $pools $variant (list $url) -}}
{{- end -}}
{{- $_ := set $config "pools" $pools -}}
{{- $gateway := mergeOverwrite ($config.gateway | default dict) (dict "host" "0.0.0.0" "port" 8080) -}}
{{- $_ := set $gateway "shutdown_timeout_s" (int .Values.gateway.longestStreamSeconds) -}}
{{- if .Values.gateway.tlsSecret -}}
{{- $_ := mergeOverwrite $gateway (dict "tls_certificate" "/etc/tiercel-tls/tls.crt" "tls_key" "/etc/tiercel-tls/tls.key") -}}
{{- end -}}
{{- $_ := set $config "gateway" $gateway -}}
{{- if .Values.watch.storeSecret.name -}}
{{- $_ := set $config "watch" (mergeOverwrite ($config.watch | default dict) (dict "store_env" "TIERCEL_WATCH_STORE")) -}}
{{- end -}}
{{- toJson $config -}}
{{- end -}}

{{/* The job's configuration: the same roles and budgets, engines of its own. */}}
{{- define "tiercel.quantizeConfig" -}}
{{- $config := include "tiercel.baseConfig" . | fromJson -}}
{{- $path := ternary (printf "/models/%s" (.Values.quantize.model.huggingFace.repo | replace "/" "--")) (printf "/models/%s" .Values.quantize.model.path | trimSuffix "/") (ne .Values.quantize.model.huggingFace.repo "") -}}
{{- $_ := set $config "model" (dict "name" .Values.model.name "path" $path) -}}
{{- $_ := unset $config "keys" -}}
{{- $_ := unset $config "gateway" -}}
{{- $_ := unset $config "watch" -}}
{{- $_ := unset $config "responses" -}}
{{- $_ := unset $config "providers" -}}
{{- $_ := set $config "engine" (mergeOverwrite (dict "python" .Values.quantize.enginePython "max_model_len" (int .Values.engine.maxModelLen)) ($config.engine | default dict)) -}}
{{- toJson $config -}}
{{- end -}}

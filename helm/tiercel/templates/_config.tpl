{{/* tiercel.yaml from its parts. Values are written as JSON, which is YAML: Helm's numbers are floats, and its YAML
     writes a million as 1e+06, which is a string to other readers. The order of models means something, and Helm's
     maps have none. */}}
{{- define "tiercel.configText" -}}
models:
{{- range .models }}
  {{ .name | toJson }}: {{ .settings | toJson }}
{{- end }}
{{- range $key, $value := .rest }}
{{ $key }}: {{ $value | toPrettyJson | indent 2 | trim }}
{{- end }}
{{- end -}}

{{/* A model as both configurations have it, as JSON: its reference, what is served of it, and the context that every
     one of its pools takes. */}}
{{- define "tiercel.modelSettings" -}}
{{- $model := get .root.Values.models .model -}}
{{- $length := 0 -}}
{{- range $variant, $_ := $model.pools -}}
{{- $pool := include "tiercel.pool" (dict "root" $.root "model" $.model "variant" $variant) | fromYaml -}}
{{- $length = ternary (int64 $pool.maxModelLen) (min $length (int64 $pool.maxModelLen)) (eq (int64 $length) 0) -}}
{{- end -}}
{{- $settings := dict "reference" (include "tiercel.reference" $model) "serve" (keys $model.pools | sortAlpha) -}}
{{- $settings = merge $settings (ternary (pick $model "hub" "revision") (dict "path" .path) (hasKey $model "hub")) -}}
{{- $_ := set $settings "engine" (dict "max_model_len" (int64 $length)) -}}
{{- $settings | toJson -}}
{{- end -}}

{{- define "tiercel.reference" -}}
{{- .reference | default "bf16" -}}
{{- end -}}

{{/* The gateway's tiercel.yaml. */}}
{{- define "tiercel.config" -}}
{{- $models := list -}}
{{- $pools := dict -}}
{{- range $name := include "tiercel.models" . | fromJsonArray -}}
{{- $model := get $.Values.models $name -}}
{{- $path := printf "%s/%s/current" (include "tiercel.variantsOf" $name) (include "tiercel.reference" $model) -}}
{{- $settings := include "tiercel.modelSettings" (dict "root" $ "model" $name "path" $path) | fromJson -}}
{{- $models = append $models (dict "name" $name "settings" $settings) -}}
{{- range $variant, $_ := $model.pools -}}
{{- $pool := include "tiercel.poolName" (dict "root" $ "model" $name "variant" $variant) -}}
{{- $_ := set $pools (printf "%s:%s" $name $variant) (list (printf "dns+http://%s.%s.svc:8000" $pool $.Release.Namespace)) -}}
{{- end -}}
{{- end -}}
{{- $config := deepCopy .Values.gateway.config -}}
{{- $_ := set $config "variants_dir" "/variants" -}}
{{- $_ := set $config "run_dir" "/run/tiercel" -}}
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
{{- include "tiercel.configText" (dict "models" $models "rest" $config) -}}
{{- end -}}

{{/* The job's: the same models, roles and budgets, with the checkpoints, and engines of its own. Nothing is served by
     it, so no reference needs to be. */}}
{{- define "tiercel.quantizeConfig" -}}
{{- $models := list -}}
{{- range $name := include "tiercel.models" . | fromJsonArray -}}
{{- $model := get $.Values.models $name -}}
{{- $path := include "tiercel.checkpoint" (dict "name" $name "model" $model) -}}
{{- $settings := include "tiercel.modelSettings" (dict "root" $ "model" $name "path" $path) | fromJson -}}
{{- with $model.calibration -}}{{- $_ := set $settings "calibration" . -}}{{- end -}}
{{- $models = append $models (dict "name" $name "settings" $settings) -}}
{{- end -}}
{{- $config := omit (deepCopy .Values.gateway.config) "keys" "gateway" "responses" "providers" "adapters" -}}
{{- $_ := set $config "variants_dir" "/variants" -}}
{{- $_ := set $config "run_dir" "/run/tiercel" -}}
{{- $_ := set $config "watch" (dict "reference" "none") -}}
{{- $_ := set $config "engine" (mergeOverwrite (dict "python" .Values.quantize.enginePython) ($config.engine | default dict)) -}}
{{- include "tiercel.configText" (dict "models" $models "rest" $config) -}}
{{- end -}}

{{/* Where the job finds a model's checkpoint, unless it is the hub's. */}}
{{- define "tiercel.checkpoint" -}}
{{- $image := (.model.checkpointImage | default dict).reference -}}
{{- if $image -}}
{{ printf "/checkpoint/%s" (.model.path | default "") | trimSuffix "/" }}
{{- else -}}
/checkpoints/{{ .model.path | default "" | trimSuffix "/" }}
{{- end -}}
{{- end -}}

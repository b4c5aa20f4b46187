{{/* A name of at most `most` characters: as it is, or shortened and told apart by a hash. */}}
{{- define "tiercel.short" -}}
{{- if le (len .name) (int .most) -}}
{{ .name }}
{{- else -}}
{{ printf "%s-%s" (.name | trunc (sub .most 9 | int) | trimSuffix "-") (.name | sha256sum | trunc 8) }}
{{- end -}}
{{- end -}}

{{- define "tiercel.name" -}}
{{- include "tiercel.short" (dict "name" (.Values.fullnameOverride | default .Release.Name) "most" 30) -}}
{{- end -}}

{{/* A DNS label for any model's name. */}}
{{- define "tiercel.slug" -}}
{{- $slug := regexReplaceAll "[^a-z0-9]+" (. | lower) "-" | trimAll "-" -}}
{{- $slug = ternary $slug (printf "%s-%s" (trunc 12 $slug | trimSuffix "-") (. | sha256sum | trunc 8)) (and (eq $slug .) (le (len $slug) 21)) -}}
{{- $slug -}}
{{- end -}}

{{/* The name of a pool's objects, at most 48 characters: those of a LeaderWorkerSet add to it. Model and variant are
     told apart in it without doubt only where the model has no dash; else a hash tells pools apart. */}}
{{- define "tiercel.poolName" -}}
{{- $name := include "tiercel.name" .root -}}
{{- $plain := printf "%s-%s-%s" $name .model .variant -}}
{{- if and (regexMatch "^[a-z0-9]+$" .model) (regexMatch "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$" .variant) (le (len $plain) 48) -}}
{{ $plain }}
{{- else -}}
{{- $slug := regexReplaceAll "[^a-z0-9]+" (printf "%s-%s" .model .variant | lower) "-" | trimAll "-" -}}
{{ printf "%s-%s-%s" $name (trunc (sub 38 (len $name) | int) $slug | trimSuffix "-") (printf "%s:%s" .model .variant | sha256sum | trunc 8) }}
{{- end -}}
{{- end -}}

{{/* Any text as a label's value. */}}
{{- define "tiercel.labelValue" -}}
{{- if and (regexMatch "^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$" .) (le (len .) 63) -}}
{{ . }}
{{- else -}}
{{ printf "%s-%s" (regexReplaceAll "[^-A-Za-z0-9_.]+" . "-" | trunc 50 | trimAll "-_.") (. | sha256sum | trunc 8) }}
{{- end -}}
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

{{/* What selects the engines of a pool. */}}
{{- define "tiercel.poolSelector" -}}
{{ include "tiercel.selector" (dict "root" .root "component" "engine") }}
tiercel.dev/pool: {{ include "tiercel.poolName" . }}
{{- end -}}

{{/* Which pool it is, for people and for Prometheus. */}}
{{- define "tiercel.poolLabels" -}}
tiercel.dev/model: {{ include "tiercel.labelValue" .model | quote }}
tiercel.dev/variant: {{ include "tiercel.labelValue" .variant | quote }}
{{- end -}}

{{/* Where the files of a model's variants lie. */}}
{{- define "tiercel.variantsOf" -}}
/variants/{{ . | replace "/" "--" }}
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

{{/* The models' names, the default one first, as a JSON list. */}}
{{- define "tiercel.models" -}}
{{- $default := .Values.defaultModel | default (keys .Values.models | sortAlpha | first) -}}
{{- concat (list $default) (without (keys .Values.models | sortAlpha) $default) | toJson -}}
{{- end -}}

{{/* A pool with the model's and the chart's defaults for what it leaves out. */}}
{{- define "tiercel.pool" -}}
{{- $model := get .root.Values.models .model -}}
{{- $pool := mergeOverwrite (deepCopy .root.Values.engine) (deepCopy ($model.engine | default dict)) (deepCopy (get $model.pools .variant | default dict)) -}}
{{- $pool | toYaml -}}
{{- end -}}

{{/* What the job makes of a model, as a JSON list of variants; empty when there is no job. */}}
{{- define "tiercel.made" -}}
{{- $made := list -}}
{{- if .root.Values.quantize.enabled -}}
{{- $quantize := (get .root.Values.models .model).quantize | default dict -}}
{{- $made = $quantize.make | default list -}}
{{- range $quantize.plan -}}{{- $made = append $made .name -}}{{- end -}}
{{- end -}}
{{- $made | toJson -}}
{{- end -}}

{{/* Not empty for a pool that has no pods, because the job makes its variant. */}}
{{- define "tiercel.held" -}}
{{- if has .variant (include "tiercel.made" . | fromJsonArray) -}}held{{- end -}}
{{- end -}}

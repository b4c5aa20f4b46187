{{/* The volume of the variants, for those who read it. */}}
{{- define "tiercel.variantsVolume" -}}
- name: variants
  {{- if .Values.variants.image.reference }}
  image: {{- toYaml .Values.variants.image | nindent 4 }}
  {{- else }}
  persistentVolumeClaim: { claimName: {{ include "tiercel.claim" . }}, readOnly: true }
  {{- end }}
{{- end -}}

{{/* What every pod has. Service links are off: of a service called `vllm` Kubernetes would make VLLM_PORT=tcp://…,
     which vLLM reads as its own setting. */}}
{{- define "tiercel.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  # Weights are many and large: their owner is changed only where it is another.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tiercel.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{/* Environment variables of our own, but those that the values give otherwise, and then the values'. */}}
{{- define "tiercel.env" -}}
{{- $given := .given | default list -}}
{{- $names := list -}}
{{- range $given -}}{{- $names = append $names .name -}}{{- end -}}
{{- $all := list -}}
{{- range .own -}}
{{- if not (has .name $names) -}}{{- $all = append $all . -}}{{- end -}}
{{- end -}}
{{- concat $all $given | toYaml -}}
{{- end -}}

{{/* Of a container that computes: what it asks for, GPUs and claims among it. */}}
{{- define "tiercel.resources" -}}
{{- $devices := dict -}}
{{- if and (gt (int .gpus) 0) .gpuResource -}}
{{- $devices = dict .gpuResource (int .gpus) -}}
{{- end -}}
requests:
  {{- toYaml (.resources.requests | default dict) | nindent 2 }}
{{- with merge (deepCopy (.resources.limits | default dict)) $devices }}
limits:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .resourceClaims }}
claims:
  {{- range . }}
  - { name: {{ .name }}{{ with .request }}, request: {{ . }}{{ end }} }
  {{- end }}
{{- end }}
{{- end -}}

{{/* What places a pod. */}}
{{- define "tiercel.placement" -}}
{{- with .resourceClaims }}
resourceClaims:
  {{- $named := list }}
  {{- range . }}
  {{- if not (has .name $named) }}
  - {{- omit . "request" | toYaml | nindent 4 }}
  {{- $named = append $named .name }}
  {{- end }}
  {{- end }}
{{- end }}
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

{{/* What no schema can say. Every sentence names the field, the value and the fix. */}}
{{- define "tiercel.check" -}}
{{- include "tiercel.checkOneModel" . -}}
{{- if not .Values.models -}}
{{- fail "models: is empty; give at least one: { NAME: { reference: bf16, pools: { bf16: {} } } }" -}}
{{- end -}}
{{- if not .Values.defaultModel -}}
{{- if gt (len .Values.models) 1 -}}
{{- fail (printf "defaultModel: is empty; name the model of requests and roles that name none: one of %s" (keys .Values.models | sortAlpha | join ", ")) -}}
{{- end -}}
{{- else if not (hasKey .Values.models .Values.defaultModel) -}}
{{- fail (printf "defaultModel: %q is not a model; use one of: %s" .Values.defaultModel (keys .Values.models | sortAlpha | join ", ")) -}}
{{- end -}}
{{- if and .Values.variants.existingClaim .Values.variants.image.reference -}}
{{- fail (printf "variants.image.reference: %q and variants.existingClaim %q both say where the variants are; empty one" .Values.variants.image.reference .Values.variants.existingClaim) -}}
{{- end -}}
{{- if and .Values.variants.image.reference (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "image volumes need Kubernetes 1.31, and this is %s; use a claim" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- range $where, $image := dict "gateway" .Values.gateway.image "quantize" .Values.quantize.image -}}
{{- if and (eq $image.tag "latest") (not $image.digest) -}}
{{- fail (printf "%s.image.tag: \"latest\" is another image tomorrow; give a version or a digest" $where) -}}
{{- end -}}
{{- end -}}
{{- include "tiercel.checkPools" . -}}
{{- include "tiercel.checkGateway" . -}}
{{- include "tiercel.checkRoles" . -}}
{{- include "tiercel.checkQuantize" . -}}
{{- end -}}

{{/* Values of the time when a release had one model. */}}
{{- define "tiercel.checkOneModel" -}}
{{- $model := .Values.model | default dict -}}
{{- if or $model .Values.pools -}}
{{- $pools := .Values.pools | default (dict ($model.reference | default "bf16") dict) -}}
{{- fail (printf "%s: a release has several models now, and this belongs to one of them; write models: { %s: { reference: %s, pools: %s } }" (ternary "model" "pools" (ne (len $model) 0)) ($model.name | default "NAME") ($model.reference | default "bf16") (toJson $pools)) -}}
{{- end -}}
{{- with .Values.quantize.make -}}
{{- fail (printf "quantize.make: belongs to a model now; write models: { NAME: { quantize: { make: %s } } }, the reference among them unless it is there already" (toJson .)) -}}
{{- end -}}
{{- with .Values.quantize.plan -}}
{{- fail (printf "quantize.plan: belongs to a model now; write models: { NAME: { quantize: { plan: %s } } }" (toJson .)) -}}
{{- end -}}
{{- with .Values.quantize.model -}}
{{- fail "quantize.model: is a model's own now; write models: { NAME: { hub: OWNER/NAME, revision: … } }, or path and quantize.checkpoints.existingClaim, or checkpointImage" -}}
{{- end -}}
{{- with .Values.quantize.models -}}
{{- fail "quantize.models: is gone: a checkpoint of the hub is fetched to where the variants lie; give variants.size room for it, and name a claim with checkpoints of your own in quantize.checkpoints.existingClaim" -}}
{{- end -}}
{{- with .Values.quantize.tasksConfigMap -}}
{{- fail (printf "quantize.tasksConfigMap: write quantize: { tasks: { configMap: %s } }; a claim or an image can be named as well" .) -}}
{{- end -}}
{{- end -}}

{{- define "tiercel.checkPools" -}}
{{- $watch := .Values.gateway.config.watch | default dict -}}
{{- $asked := and (ne (toString $watch.enabled) "false") (eq ($watch.reference | default "live") "live") -}}
{{- $names := dict -}}
{{- range $model, $settings := .Values.models -}}
{{- $settings = $settings | default dict -}}
{{- $reference := include "tiercel.reference" $settings -}}
{{- if not $settings.pools -}}
{{- fail (printf "models.%s.pools: is empty; give a pool per variant that is to be served, such as { %s: {} }" $model $reference) -}}
{{- end -}}
{{- if and $asked (not (hasKey $settings.pools $reference)) -}}
{{- fail (printf "models.%s.pools: has no pool for the reference %q, which the watch asks; add it, set models.%s.reference to one of: %s, or set gateway.config.watch.reference to none" $model $reference $model (keys $settings.pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- range $variant, $given := $settings.pools -}}
{{- $one := dict "root" $ "model" $model "variant" $variant -}}
{{- $where := printf "models.%s.pools.%s" $model $variant -}}
{{- $name := include "tiercel.poolName" $one -}}
{{- if hasKey $names $name -}}
{{- fail (printf "%s: would be called %s as %s is; rename one of them" $where $name (get $names $name)) -}}
{{- end -}}
{{- $_ := set $names $name $where -}}
{{- $pool := include "tiercel.pool" $one | fromYaml -}}
{{- include "tiercel.checkPool" (dict "where" $where "pool" $pool "given" ($given | default dict) "root" $ "reference" (eq $variant $reference)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tiercel.checkPool" -}}
{{- $where := .where -}}
{{- $pool := .pool -}}
{{- if and (eq $pool.image.tag "latest") (not $pool.image.digest) -}}
{{- fail (printf "%s.image.tag: \"latest\" is another image tomorrow; give a version or a digest" $where) -}}
{{- end -}}
{{- $ranks := mul (int $pool.tensorParallel) (int $pool.pipelineParallel) -}}
{{- $gpus := mul (int $pool.gpus) (int $pool.nodes) -}}
{{- if and (gt (int $pool.gpus) 0) (ne $gpus $ranks) -}}
{{- $each := ternary (printf " on each of %d nodes" (int $pool.nodes)) "" (gt (int $pool.nodes) 1) -}}
{{- fail (printf "%s.gpus: is %d%s, but tensorParallel %d x pipelineParallel %d are %d ranks; make them equal" $where (int $pool.gpus) $each (int $pool.tensorParallel) (int $pool.pipelineParallel) (int $ranks)) -}}
{{- end -}}
{{- include "tiercel.checkDevices" (merge (dict "where" $where "root" .root) $pool) -}}
{{- if and (eq (int $pool.gpus) 0) (gt (int $pool.nodes) 1) -}}
{{- fail (printf "%s.nodes: is %d, and a CPU engine (gpus 0) is one pod; set it to 1" $where (int $pool.nodes)) -}}
{{- end -}}
{{- if and (eq (int $pool.gpus) 0) (eq $pool.image.repository "vllm/vllm-openai") -}}
{{- fail (printf "%s.image.repository: %q is vLLM's image for GPUs, and gpus is 0; name a CPU image" $where $pool.image.repository) -}}
{{- end -}}
{{- if $pool.autoscaling.enabled -}}
{{- if hasKey .given "replicas" -}}
{{- fail (printf "%s.replicas: is fixed, and autoscaling is on; remove one of them" $where) -}}
{{- end -}}
{{- if not $pool.autoscaling.prometheus -}}
{{- fail (printf "%s.autoscaling.prometheus: is empty; give Prometheus' address, such as http://prometheus.monitoring:9090" $where) -}}
{{- end -}}
{{- if gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas) -}}
{{- fail (printf "%s.autoscaling.minReplicas: %d is above maxReplicas %d; lower it" $where (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .reference (eq (int $pool.autoscaling.minReplicas) 0) -}}
{{- fail (printf "%s.autoscaling.minReplicas: is 0, and the reference is what requests go up to when another pool is down; set it to 1" $where) -}}
{{- end -}}
{{- end -}}
{{- if $pool.inferencePool.enabled -}}
{{- if not $pool.inferencePool.endpointPicker -}}
{{- fail (printf "%s.inferencePool.endpointPicker: is empty; name the service of the endpoint picker" $where) -}}
{{- end -}}
{{- if and .root.Values.networkPolicy.enabled (not $pool.inferencePool.from) -}}
{{- fail (printf "%s.inferencePool.from: is empty, and the network policy lets nobody but the gateway to the engines; name the pods of the endpoint picker and of the Gateway, such as [{ podSelector: { matchLabels: { app: %s } } }]" $where $pool.inferencePool.endpointPicker) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* GPUs by the device plugin, or by claims. */}}
{{- define "tiercel.checkDevices" -}}
{{- if and (gt (int .gpus) 0) (not .gpuResource) (not .resourceClaims) -}}
{{- fail (printf "%s.gpuResource: is empty, and so is resourceClaims: nothing asks for the %d GPUs; give one of them" .where (int .gpus)) -}}
{{- end -}}
{{- if and .resourceClaims (semverCompare "<1.34-0" .root.Capabilities.KubeVersion.Version) -}}
{{- fail (printf "%s.resourceClaims: need Kubernetes 1.34, and this is %s; use gpuResource" .where .root.Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}

{{- define "tiercel.checkGateway" -}}
{{- range $field := list "models" "variants_dir" "pools" "run_dir" -}}
{{- if hasKey $.Values.gateway.config $field -}}
{{- fail (printf "gateway.config.%s: is written by the chart; remove it and use models and variants" $field) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.gateway.config.keys -}}
{{- fail "gateway.config.keys: is empty, and a gateway in a cluster can be reached by others; `tiercel keys new NAME` makes a key and prints its lines" -}}
{{- end -}}
{{- $watch := .Values.gateway.config.watch | default dict -}}
{{- if $watch.store -}}
{{- fail "gateway.config.watch.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret and name it in watch.storeSecret" -}}
{{- end -}}
{{- if (.Values.gateway.config.responses | default dict).store -}}
{{- fail "gateway.config.responses.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret, name it in watch.storeSecret or gateway.extraEnv, and the variable in gateway.config.responses.store_env (TIERCEL_WATCH_STORE is watch.storeSecret's)" -}}
{{- end -}}
{{- if hasKey .Values.gateway.config "kept" -}}
{{- $kept := .Values.gateway.config.kept | default dict -}}
{{- if $kept.store -}}
{{- fail "gateway.config.kept.store: may hold a password and does not belong into a ConfigMap; put the URL into a secret, name it in watch.storeSecret or gateway.extraEnv, and the variable in gateway.config.kept.store_env (TIERCEL_WATCH_STORE is watch.storeSecret's)" -}}
{{- end -}}
{{- range $field := list "store_env" "key_env" -}}
{{- if not (get $kept $field) -}}
{{- fail (printf "gateway.config.kept.%s: is empty, and what a pod has in its own directory is gone with it; name a variable of gateway.extraEnv that comes from a secret" $field) -}}
{{- end -}}
{{- end -}}
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
{{- end -}}

{{- define "tiercel.checkRoles" -}}
{{- $roles := .Values.gateway.config.roles -}}
{{- if not $roles -}}
{{- fail "gateway.config.roles: is empty; give at least one, such as core: { budget: { min_weight_bits: 16 } }" -}}
{{- end -}}
{{- with .Values.gateway.config.default_role -}}
{{- if not (hasKey $roles .) -}}
{{- fail (printf "gateway.config.default_role: %q is not a role; use one of: %s" . (keys $roles | sortAlpha | join ", ")) -}}
{{- end -}}
{{- else -}}
{{- fail "gateway.config.default_role: is empty; name the role of requests that name none" -}}
{{- end -}}
{{- $served := list -}}
{{- $ids := list -}}
{{- range $model, $settings := .Values.models -}}
{{- range $variant, $_ := $settings.pools -}}
{{- $served = append $served $variant -}}
{{- $ids = append $ids (printf "%s:%s" $model $variant) -}}
{{- end -}}
{{- end -}}
{{- range $name, $role := $roles -}}
{{- range ($role | default dict).models -}}
{{- if not (hasKey $.Values.models .) -}}
{{- fail (printf "gateway.config.roles.%s.models: %q is not a model; use some of: %s" $name . (keys $.Values.models | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- with ($role | default dict).canary -}}
{{- if not (or (has .variant $ids) (has .variant $served)) -}}
{{- fail (printf "gateway.config.roles.%s.canary.variant: %q has no pool; add one, or use one of: %s" $name .variant ($ids | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tiercel.checkQuantize" -}}
{{- if .Values.quantize.enabled -}}
{{- if .Values.variants.image.reference -}}
{{- fail (printf "quantize.enabled: is true, and the variants are an image (%q), which nobody can write to; empty variants.image.reference" .Values.variants.image.reference) -}}
{{- end -}}
{{- $any := false -}}
{{- range $model, $settings := .Values.models -}}
{{- $made := include "tiercel.made" (dict "root" $ "model" $model) | fromJsonArray -}}
{{- if $made -}}
{{- $any = true -}}
{{- $job := mergeOverwrite (deepCopy $.Values.quantize) (deepCopy $settings.quantize) -}}
{{- include "tiercel.checkJob" (dict "root" $ "where" (printf "models.%s" $model) "settings" $settings "job" $job) -}}
{{- end -}}
{{- if and $.Release.IsInstall (not $.Values.variants.existingClaim) -}}
{{- range $variant, $_ := $settings.pools -}}
{{- if not (has $variant $made) -}}
{{- fail (printf "models.%s.pools.%s: nobody makes it: the claim is new, and the job makes %s; add it to models.%s.quantize.make or plan, remove the pool, or name the claim in variants.existingClaim if it has it already" $model $variant (join ", " $made | default "nothing of this model") $model) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not $any -}}
{{- fail "quantize.enabled: is true, and there is nothing to make; name it in models.NAME.quantize.make or plan" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The job of one model: its checkpoint, and the files that it is given. */}}
{{- define "tiercel.checkJob" -}}
{{- $where := .where -}}
{{- $settings := .settings -}}
{{- $job := .job -}}
{{- $version := .root.Capabilities.KubeVersion.Version -}}
{{- include "tiercel.checkDevices" (merge (dict "where" (printf "%s.quantize" $where) "root" .root) $job) -}}
{{- $image := ($settings.checkpointImage | default dict).reference -}}
{{- $sources := list -}}
{{- if $settings.hub -}}{{- $sources = append $sources "hub" -}}{{- end -}}
{{- if $image -}}{{- $sources = append $sources "checkpointImage" -}}{{- end -}}
{{- if and $settings.path (not $image) -}}{{- $sources = append $sources "path" -}}{{- end -}}
{{- if ne (len $sources) 1 -}}
{{- fail (printf "%s: its checkpoint has %d sources%s; give one of hub, path (in quantize.checkpoints.existingClaim) and checkpointImage" $where (len $sources) (ternary "" (printf " (%s)" (join ", " $sources)) (empty $sources))) -}}
{{- end -}}
{{- if and (eq (first $sources) "path") (not $job.checkpoints.existingClaim) -}}
{{- fail (printf "%s.path: %q lies in no claim; name it in quantize.checkpoints.existingClaim" $where $settings.path) -}}
{{- end -}}
{{- if and $settings.revision (not $settings.hub) -}}
{{- fail (printf "%s.revision: %q is of a repository of the hub; give hub, or leave it out" $where $settings.revision) -}}
{{- end -}}
{{- $places := without (list $job.tasks.configMap $job.tasks.existingClaim $job.tasks.image.reference) "" -}}
{{- if gt (len $places) 1 -}}
{{- fail (printf "quantize.tasks: %s all say where the files are; give one of configMap, existingClaim and image" (join " and " $places)) -}}
{{- end -}}
{{- $wanted := dict -}}
{{- with $settings.calibration -}}{{- $_ := set $wanted (printf "%s.calibration" $where) . -}}{{- end -}}
{{- range $name, $role := .root.Values.gateway.config.roles -}}
{{- range $field := list "tasks" "long_context" -}}
{{- with get ($role | default dict) $field -}}{{- $_ := set $wanted (printf "gateway.config.roles.%s.%s" $name $field) . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range $field, $path := $wanted -}}
{{- if not (hasPrefix "/tasks/" $path) -}}
{{- fail (printf "%s: %q is no file that the job has; put it into quantize.tasks and write /tasks/NAME" $field $path) -}}
{{- end -}}
{{- if not $places -}}
{{- fail (printf "%s: %q is in quantize.tasks, which is empty; give configMap, existingClaim or image" $field $path) -}}
{{- end -}}
{{- end -}}
{{- if and (or $image $job.tasks.image.reference) (semverCompare "<1.31-0" $version) -}}
{{- fail (printf "image volumes need Kubernetes 1.31, and this is %s; use a claim" $version) -}}
{{- end -}}
{{- end -}}

{{/* What all objects share. `part` is controller, worker or init. */}}
{{- define "coxswain.labels" -}}
app.kubernetes.io/name: coxswain
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "coxswain.image" -}}
image: "{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}"
imagePullPolicy: {{ .image.pullPolicy | default "IfNotPresent" }}
{{- end }}

{{/* Of a pod: nobody needs the cluster's API, nor the addresses of other Services in the environment. */}}
{{- define "coxswain.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "coxswain.container" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* How to reach NATS, and as whom: `key` is the path of the key, if `secret` names one. */}}
{{- define "coxswain.env" -}}
- {name: COX_NATS_URL, value: {{ .root.Values.nats.url | quote }}}
- {name: COX_FLEET, value: {{ .root.Values.fleet | quote }}}
{{- if .secret }}
- {name: COX_NATS_NKEY, value: {{ .key | quote }}}
{{- end }}
{{- if .root.Values.nats.ca }}
- {name: COX_NATS_CA, value: /etc/coxswain/ca/ca.pem}
{{- end }}
{{- end }}

{{- define "coxswain.volumes" -}}
{{- if .secret }}
- name: key
  secret: {secretName: {{ .secret | quote }}, defaultMode: 0440}
{{- end }}
{{- if .root.Values.nats.ca }}
- name: ca
  secret: {secretName: {{ .root.Values.nats.ca | quote }}}
{{- end }}
{{- end }}

{{- define "coxswain.mounts" -}}
{{- if .secret }}
- {name: key, mountPath: /etc/coxswain/nats, readOnly: true}
{{- end }}
{{- if .root.Values.nats.ca }}
- {name: ca, mountPath: /etc/coxswain/ca, readOnly: true}
{{- end }}
{{- end }}

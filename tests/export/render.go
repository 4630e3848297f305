// Renders templates of Modelfiles as Ollama does (its template/template.go): text/template, messages of one role in a
// row merged. Reads [{"template": …, "messages": […]}, …] and writes the texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func render(text string, messages []*message) string {
	var merged []*message
	var system []string
	for _, m := range messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if last := len(merged) - 1; last >= 0 && merged[last].Role == m.Role {
			merged[last].Content += "\n\n" + m.Content
		} else {
			merged = append(merged, m)
		}
	}
	json := func(v any) string { b, _ := json.Marshal(v); return string(b) }
	parsed := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": json})
	var out strings.Builder
	values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": merged, "Response": ""}
	if err := template.Must(parsed.Parse(text)).Execute(&out, values); err != nil {
		panic(err)
	}
	return out.String()
}

func main() {
	var cases []struct {
		Template string
		Messages []*message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, c := range cases {
		texts = append(texts, render(c.Template, c.Messages))
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}

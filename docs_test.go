//go:build browser

package main

// docs_test.go uses docs.html as people do, by pointer and by keyboard, in a
// real browser. Chromedriver drives it by the WebDriver protocol
// (https://www.w3.org/TR/webdriver2/): JSON over HTTP. Debian has both, in its
// packages chromium and chromium-driver.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// pageTimeout is how long to wait for what a browser should show. Only a failing
// test waits that long.
const pageTimeout = 20 * time.Second

// Keys, and references to elements, as WebDriver names them.
const (
	elementKey = "element-6066-11e4-a52e-4f735466cecf"

	keyNull      = "\uE000" // releases the keys held
	keyBackspace = "\uE003"
	keyTab       = "\uE004"
	keyEnter     = "\uE007"
	keyControl   = "\uE009"
)

// object is a JSON object.
type object = map[string]any

// browser is a browser that shows the page.
type browser struct {
	testing.TB
	session string // URL of the WebDriver session
}

// newBrowser returns a browser that shows the page at a URL. The browser is gone
// when the test ends.
func newBrowser(t testing.TB, page string) *browser {
	t.Helper()
	b := &browser{TB: t, session: startDriver(t) + "/session"}
	flags := "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run " +
		"--disable-background-networking --disable-component-update --disable-sync --window-size=1280,900 --user-data-dir="
	var session struct{ SessionID string }
	b.call("POST", "", &session, object{"capabilities": object{"alwaysMatch": object{
		"timeouts":           object{"implicit": pageTimeout.Milliseconds(), "script": pageTimeout.Milliseconds()},
		"goog:chromeOptions": object{"args": strings.Fields(flags + t.TempDir())},
		"goog:loggingPrefs":  object{"browser": "ALL"},
	}}})
	b.session += "/" + session.SessionID
	t.Cleanup(func() { b.call("DELETE", "", nil, nil) })
	b.call("POST", "/url", nil, object{"url": page})
	return b
}

// startDriver starts chromedriver, for as long as the test runs, and returns its URL.
func startDriver(t testing.TB) string {
	t.Helper()
	cmd := exec.Command("chromedriver", "--port=0")
	home := t.TempDir()
	cmd.Env = append(cmd.Environ(), "HOME="+home, "TMPDIR="+home, "XDG_CONFIG_HOME=", "XDG_CACHE_HOME=")
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if _, port, ok := strings.Cut(lines.Text(), "started successfully on port "); ok {
			return "http://127.0.0.1:" + strings.TrimSuffix(port, ".")
		}
	}
	t.Fatalf("chromedriver has not started: %v", lines.Err())
	return ""
}

// must ends the test if there is an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// call sends a command and decodes what it returns into result, unless that is nil.
func (b *browser) call(method, path string, result, command any) {
	b.Helper()
	body, err := json.Marshal(command)
	must(b, err)
	if method != "POST" {
		body = nil
	}
	req, err := http.NewRequest(method, b.session+path, bytes.NewReader(body))
	must(b, err)
	resp, err := http.DefaultClient.Do(req)
	must(b, err)
	defer resp.Body.Close()
	var got struct{ Value json.RawMessage }
	err = json.NewDecoder(resp.Body).Decode(&got)
	if err == nil && result != nil {
		err = json.Unmarshal(got.Value, result)
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		b.Fatalf("%s %s %s: %v %.300s", method, path, body, err, got.Value)
	}
}

// find waits for an element and returns its path.
func (b *browser) find(xpath string) string {
	b.Helper()
	var element map[string]string
	b.call("POST", "/element", &element, object{"using": "xpath", "value": xpath})
	return "/element/" + element[elementKey]
}

func (b *browser) click(xpath string) {
	b.Helper()
	b.call("POST", b.find(xpath)+"/click", nil, struct{}{})
}

// keys presses and releases each of the keys, wherever the focus is.
func (b *browser) keys(keys string) {
	b.Helper()
	var actions []object
	for _, key := range keys {
		actions = append(actions, object{"type": "keyDown", "value": string(key)}, object{"type": "keyUp", "value": string(key)})
	}
	b.call("POST", "/actions", nil, object{"actions": []object{{"type": "key", "id": "keyboard", "actions": actions}}})
}

// eval runs JavaScript and returns what it returns.
func eval[T any](b *browser, script string) (value T) {
	b.Helper()
	b.call("POST", "/execute/sync", &value, object{"script": script, "args": []any{}})
	return value
}

// within returns the XPath of what is within an operation.
func within(operation, xpath string) string {
	return "//details[@id='" + operation + "']" + xpath
}

// asCurl is the XPath of a request as a curl command.
const asCurl = "//pre[@aria-label='Request as a curl command']"

// says returns the XPath of what tells how a request went, once it says a text.
func says(text string) string {
	return "//*[@role='status' and contains(., '" + text + "')]"
}

// press clicks a button of an operation by what is on it.
func (b *browser) press(operation, button string) {
	b.Helper()
	b.click(within(operation, `//button[normalize-space()='`+button+`']`))
}

// control returns the XPath of a control of an operation by its label.
func control(operation, label string) string {
	return within(operation, "//label[span='"+label+"']/*[2]")
}

// fill types a text into a control in the place of what was there, or selects the
// option that begins so.
func (b *browser) fill(operation, label, text string) {
	b.Helper()
	path := b.find(control(operation, label))
	b.call("POST", path+"/value", nil, object{"text": keyControl + "a" + keyNull + keyBackspace + text})
}

// property returns a property of an element.
func (b *browser) property(xpath, name string) (value string) {
	b.Helper()
	b.call("GET", b.find(xpath)+"/property/"+name, &value, nil)
	return value
}

// text waits for an element of an operation and returns all that it says.
func (b *browser) text(operation, xpath string) string {
	b.Helper()
	return b.property(within(operation, xpath), "textContent")
}

// answer waits for an operation's answer to have a status and returns a part of it.
func (b *browser) answer(operation, status, part string) string {
	b.Helper()
	b.find(within(operation, "//*[@role='status']/strong[.='"+status+"']"))
	return b.text(operation, "//pre[@aria-label='"+part+" of the answer']")
}

// answered decodes the body of an answer.
func answered[T any](b *browser, operation, status string) (value T) {
	b.Helper()
	body := b.answer(operation, status, "Body")
	must(b, json.Unmarshal([]byte(body), &value))
	return value
}

// send sends an operation's request and decodes the body of its answer.
func send[T any](b *browser, operation, status string) T {
	b.Helper()
	b.press(operation, "Send")
	return answered[T](b, operation, status)
}

// wantQuiet fails the test if the console reports anything but responses with an
// error status. It reports scripts that fail, and each violation of the
// Content-Security-Policy, such as a request to another host.
func (b *browser) wantQuiet() {
	b.Helper()
	var entries []struct{ Level, Source, Message string }
	b.call("POST", "/se/log", &entries, object{"type": "browser"})
	for _, entry := range entries {
		if entry.Source != "network" || !strings.Contains(entry.Message, "with a status of 4") {
			b.Errorf("console: %+v", entry)
		}
	}
}

// A task goes from operation to operation, and nothing of it is lost on the way.
func TestBrowserTasks(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	b := newBrowser(t, a.url+"/docs")
	title := "Buy\u202e milk"
	b.fill("createTask", "Body", `{"title": "`+title+`", "description": "Two litres"}`)
	created := send[Task](b, "createTask", "201 Created")
	for i, tt := range []struct {
		from, button, to string
		completed        bool
	}{
		{"createTask", "Complete a task, or reopen it", "completeTask", true},
		{"completeTask", "Change part of a task", "patchTask", true},
		{"patchTask", "Replace a task", "replaceTask", true},
		{"replaceTask", "Complete a task, or reopen it", "completeTask", false},
	} {
		b.press(tt.from, tt.button)
		got := send[Task](b, tt.to, "200 OK")
		if got.ID != created.ID || got.Title != title || got.Description == nil || *got.Description != "Two litres" ||
			got.Completed != tt.completed || got.Version != int64(i)+2 {
			t.Errorf("%s: %+v", tt.to, got)
		}
		if command := b.text(tt.to, asCurl); strings.ContainsAny(command, "\u202e") || strings.Contains(command, "version") {
			t.Errorf("%s: the request changes the direction of text, or has ignored members: %s", tt.to, command)
		}
	}

	b.click(within("listTasks", "/summary"))
	b.fill("listTasks", "completed", "true")
	if got := send[[]Task](b, "listTasks", "200 OK"); len(got) != 0 {
		t.Errorf("listed completed %+v", got)
	}
	b.fill("listTasks", "URL", a.url+"/api/tasks?limit=5")
	if got := b.property(control("listTasks", "limit"), "value"); got != "5" {
		t.Errorf("limit is %q after the address was edited", got)
	}
	b.press("listTasks", "Send")
	b.press("listTasks", "Delete a task")
	b.press("deleteTask", "Send")
	b.answer("deleteTask", "204 No Content", "Headers")
	b.press("deleteTask", "Send")
	b.answer("deleteTask", "404 Not Found", "Body")

	b.fill("createTask", "Body", `{"title": " ", "colour": "red"}`)
	refused := send[problem](b, "createTask", "422 Unprocessable Entity")
	if shown := b.text("createTask", "//*[@role='status']"); refused.Detail == "" || !strings.Contains(shown, refused.Detail) {
		t.Errorf("%q does not say %q", shown, refused.Detail)
	}
	b.click(within("getTask", "/summary"))
	b.press("getTask", "Send")
	if focus := eval[string](b, `return document.activeElement.labels[0].textContent`); focus != "id" {
		t.Errorf("without an id, the focus is on %q", focus)
	}
	b.wantQuiet()
}

// A request can name the version that an earlier answer had. The ids of deleted
// tasks are not offered.
func TestBrowserETag(t *testing.T) {
	t.Parallel()
	b := newBrowser(t, newAPI(t, Options{}).url+"/docs")
	older := send[Task](b, "createTask", "201 Created")
	b.press("createTask", "Fetch a task")
	answered[Task](b, "getTask", "200 OK")
	b.press("getTask", `Use If-None-Match: "1"`)
	b.press("getTask", "Send")
	b.answer("getTask", "304 Not Modified", "Headers")

	b.click(within("completeTask", "/summary"))
	b.press("completeTask", "Use id: "+older.ID)
	b.press("completeTask", `Use If-Match: "1"`)
	b.fill("completeTask", "Example", "No body")
	send[Task](b, "completeTask", "200 OK")
	send[any](b, "completeTask", "412 Precondition Failed")
	b.press("completeTask", "Fetch a task")
	answered[Task](b, "getTask", "200 OK")
	b.press("completeTask", `Use If-Match: "2"`)
	if got := send[Task](b, "completeTask", "200 OK"); got.Version != 3 || got.Completed {
		t.Errorf("flipped twice: %+v", got)
	}
	b.press("completeTask", "Complete a task, or reopen it")
	if got := b.property(control("completeTask", "If-Match"), "value"); got != "" {
		t.Errorf("the next request has If-Match: %s", got)
	}

	b.click(within("deleteTask", "/summary"))
	b.fill("deleteTask", "id", strings.ToUpper(older.ID))
	newer := send[Task](b, "createTask", "201 Created")
	b.press("deleteTask", "Send")
	b.answer("deleteTask", "204 No Content", "Headers")
	b.press("deleteTask", "Use id: "+newer.ID)
	b.wantQuiet()
}

// The page works below a prefix, too.
func TestBrowserPages(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{Prefix: "/todo"})
	for i := range 3 {
		a.create(fmt.Sprintf(`{"title": "Task %d"}`, i))
	}
	server := httptest.NewServer(http.StripPrefix("/todo", a.Handler))
	t.Cleanup(server.Close)
	b := newBrowser(t, server.URL+"/todo/docs#listTasks")
	b.fill("listTasks", "limit", "2")
	first := send[[]Task](b, "listTasks", "200 OK")
	b.press("listTasks", "Next page")
	if got := answered[[]Task](b, "listTasks", "200 OK"); len(first) != 2 || len(got) != 1 {
		t.Errorf("pages: %+v, %+v", first, got)
	}
	if got := b.property(control("listTasks", "after"), "value"); got != first[1].ID {
		t.Errorf("after is %q", got)
	}
	if strings.Contains(b.text("listTasks", "//*[@role='group' and @aria-label='What next']"), "Next page") {
		t.Error("the last page has a next one")
	}
	b.wantQuiet()
}

// Text from clients stays text, on the page and in the shell. The command is
// there before the request is sent, and says the same.
func TestBrowserText(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	a.create(`{"title": "First"}`)
	b := newBrowser(t, a.url+"/docs")
	title := `<img src=x onerror="document.title='run'"> it's $(id) ` + "`id` \\ !"
	body, _ := json.MarshalIndent(object{"title": title}, "", "  ")
	b.click(within("common", "/summary"))
	b.fill("common", "One header per line", "Authorization: Bearer it's\nCookie: a=b\nX-None:")
	b.fill("createTask", "Body", string(body))
	b.fill("createTask", "URL", "/api/tasks?user_id=[it's]")
	command := b.text("createTask", asCurl)
	args, err := exec.Command("sh", "-c", `curl() { printf '%s\0' "$@"; }; `+command).Output()
	must(t, err)
	got := strings.Split(strings.TrimSuffix(string(args), "\x00"), "\x00")
	want := []string{
		"-iL", "--globoff", "-X", "POST", a.url + "/api/tasks?user_id=[it%27s]", "-H", "authorization: Bearer it's",
		"-H", "content-type: application/json", "-H", "x-none;", "--data-raw", string(body),
	}
	if !slices.Equal(got, want) {
		t.Errorf("curl's arguments are\n%q, want\n%q", got, want)
	}
	b.find(within("createTask", "//p[contains(., 'do not send') and contains(., ': cookie.')]"))
	if got := send[Task](b, "createTask", "201 Created"); got.Title != title || *got.UserID != "[it's]" {
		t.Errorf("created %+v", got)
	}
	b.press("createTask", "Copy")
	b.find(within("createTask", "//button[.='Copied']"))
	b.fill("createTask", "Body", keyControl+"v")
	if got := b.property(control("createTask", "Body"), "value"); got != command {
		t.Errorf("copied %q, want %q", got, command)
	}
	eval[any](b, `Object.defineProperty(navigator, 'clipboard', {})`)
	b.press("createTask", "Copy")
	b.find(within("createTask", "//button[contains(., 'press Ctrl+C')]"))
	for address, header := range map[string]string{"https://elsewhere.example/": "X-Common: 1", "/api/tasks": "no colon"} {
		b.fill("createTask", "URL", address)
		b.fill("common", "One header per line", header)
		b.press("createTask", "Send")
		b.text("createTask", says("cannot be sent"))
	}
	b.fill("common", "One header per line", "X-Common: 1")

	b.click(within("listTasks", "/summary"))
	send[[]Task](b, "listTasks", "200 OK")
	if got, want := b.property(control("listTasks", "Task")+"/option[2]", "textContent"), "2. "+title; got != want {
		t.Errorf("offered task is %q, want %q", got, want)
	}
	made := eval[string](b, `return document.title + document.querySelectorAll('img, [onerror]').length + localStorage.length`)
	if made != "Tasks API00" {
		t.Errorf("a title has become markup, or something is stored: %s", made)
	}
	b.wantQuiet()
}

// Whatever comes is shown, to the letter. If nothing comes, the page says what may
// have happened.
func TestBrowserOddAnswers(t *testing.T) {
	t.Parallel()
	odd := map[string]struct{ body, says string }{
		"truncated": {`{"id": "1`, "is broken"},
		"html":      {"<b>Bad</b>\r\n gateway", "is broken"},
		"object":    {`{"id": "1", "version": {"toString": 1}, "detail": {"toString": 1}, "errors": [null]}`, "200 OK"},
		"array":     {` [null, {"id": "1", "title": {"toString": 1}, "version": 1}]`, "200 OK"},
		"markdown":  {"{\"detail\": \"**not** `marked`\"}", "**not** `marked`"},
		"numbers":   {`{"id":"1","n":[9007199254740993,1.0,1E2,-0],"s":"a\/b  c","title":"` + "\u202e" + `"}`, "200 OK"},
		"deep":      {strings.Repeat(`{"a":[`, 5000) + strings.Repeat("]}", 5000), "200 OK"},
		"bom":       {"\ufeff{}", "is broken"},
		"broken":    {`{"id": "1"}`, "is broken"},
	}
	arrived, shown := make(chan bool, 10), make(chan bool)
	mux := http.NewServeMux()
	mux.Handle("/", newAPI(t, Options{}).Handler)
	mux.HandleFunc("/odd/{name}", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/problem+json")
		io.WriteString(w, odd[r.PathValue("name")].body)
		if r.PathValue("name") == "broken" {
			http.NewResponseController(w).Flush()
			<-shown
			panic(http.ErrAbortHandler)
		}
	})
	mux.HandleFunc("/api/tasks/wait", func(w http.ResponseWriter, r *http.Request) {
		arrived <- true
		<-r.Context().Done() // until it is cancelled
	})
	mux.HandleFunc("/none", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	b := newBrowser(t, server.URL+"/docs")
	for name, want := range odd {
		b.fill("createTask", "URL", "/odd/"+name)
		b.press("createTask", "Send")
		if name == "broken" {
			b.text("createTask", says("the rest"))
			shown <- true
		}
		says := b.text("createTask", says("odd/"+name))
		if got := b.answer("createTask", "200 OK", "Body"); got != want.body || !strings.Contains(says, want.says) {
			t.Errorf("%s: shown is %q, with %.200q", name, says, got)
		}
	}

	b.fill("createTask", "URL", "/none")
	b.fill("createTask", "Body", "{}"+keyControl+keyEnter)
	if got := b.text("createTask", says("No answer came")); !strings.Contains(got, "may have been made") || !strings.Contains(b.text("createTask", asCurl), "/none'") {
		t.Errorf("after a lost connection: %q", got)
	}
	for operation, change := range map[string]bool{"deleteTask": true, "getTask": false} {
		b.click(within(operation, "/summary"))
		b.fill(operation, "id", "wait"+keyEnter)
		<-arrived
		b.text(operation, says("Waiting"))
		b.press(operation, "Send")
		b.press(operation, "Cancel")
		if got := b.text(operation, says("Cancelled")); strings.Contains(got, "may have been made") != change {
			t.Errorf("after a cancelled %s: %q", operation, got)
		}
	}
	if len(arrived) > 0 {
		t.Error("a request was sent while one was awaited")
	}
	if focus := eval[string](b, `return document.activeElement.textContent`); focus != "Send" {
		t.Errorf("after Cancel, the focus is on %q", focus)
	}
}

// Each operation has a link, and all of them are printed.
func TestBrowserLinks(t *testing.T) {
	t.Parallel()
	b := newBrowser(t, newAPI(t, Options{}).url+"/docs#getTask")
	b.find("//section[@id='all']")
	wantOpen := func(want ...string) {
		t.Helper()
		got := eval[[]string](b, `return [location.hash, ...[...document.querySelectorAll('.operation[open]')].map((open) => open.id)]`)
		if !slices.Equal(got, want) {
			t.Errorf("the address and what is open are %q, want %q", got, want)
		}
	}
	wantOpen("#getTask", "getTask")
	b.click(within("listTasks", "/summary"))
	wantOpen("#listTasks", "listTasks", "getTask")
	b.click(within("getTask", "//a[@href='#getTask']"))
	wantOpen("#getTask", "listTasks", "getTask")
	eval[any](b, `location.hash = 'deleteTask'`)
	b.find(within("deleteTask", "[@open]"))
	wantOpen("#deleteTask", "listTasks", "getTask", "deleteTask")

	var pdf []byte
	b.call("POST", "/print", &pdf, object{})
	if pages := bytes.Count(pdf, []byte("/Type /Page\n")); pages < 8 || pages > 18 {
		t.Errorf("%d pages are printed", pages)
	}
	b.call("POST", "/goog/cdp/execute", nil, object{"cmd": "Emulation.setEmulatedMedia", "params": object{"media": "print"}})
	wrong := eval[int](b, `return [...document.querySelectorAll('form, .reference')]
		.filter((part) => part.checkVisibility({ contentVisibilityAuto: true }) === part.matches('form')).length`)
	if wrong > 0 {
		t.Errorf("%d parts are not as they are to be printed", wrong)
	}
	b.wantQuiet()
}

func TestBrowserKeyboard(t *testing.T) {
	t.Parallel()
	b := newBrowser(t, newAPI(t, Options{}).url+"/docs")
	b.find(within("createTask", "//button[.='Send']"))
	// tabTo goes on to the next element that says text, and wants to see the focus.
	tabTo := func(text string) {
		t.Helper()
		for range 100 {
			b.keys(keyTab)
			focus := eval[[]string](b, `return [document.activeElement.textContent, getComputedStyle(document.activeElement).outlineStyle]`)
			if focus[1] == "none" {
				t.Errorf("the focus on %q cannot be seen", focus[0])
			}
			if focus[0] == text {
				return
			}
		}
		t.Fatalf("%q cannot be reached", text)
	}
	tabTo("Send")
	b.keys(keyEnter)
	b.answer("createTask", "201 Created", "Body")
	tabTo("Complete a task, or reopen it")
	b.keys(keyEnter + keyEnter) // the second presses Send
	if got := answered[Task](b, "completeTask", "200 OK"); !got.Completed {
		t.Errorf("completed %+v", got)
	}
	tabTo("Delete a task")
	b.keys(keyEnter + keyEnter)
	b.answer("deleteTask", "204 No Content", "Headers")
	b.wantQuiet()
}

// Everything can be read in both themes, fits a small phone with wide text
// spacing (WCAG 2.2, 1.4.12), and has a name for those who do not see it.
func TestBrowserLooks(t *testing.T) {
	t.Parallel()
	b := newBrowser(t, newAPI(t, Options{}).url+"/docs")
	b.fill("createTask", "Body", `{"title": "`+strings.Repeat("W", 200)+`"}`)
	b.fill("createTask", "URL", "/api/tasks?user_id="+strings.Repeat("w", 255))
	send[Task](b, "createTask", "201 Created")
	b.click(within("listTasks", "/summary"))
	send[[]Task](b, "listTasks", "200 OK")
	b.fill("createTask", "Body", "{}")
	send[problem](b, "createTask", "422 Unprocessable Entity")
	eval[any](b, `for (const details of document.querySelectorAll('details')) details.open = true;`)

	for _, theme := range []string{"light", "dark"} {
		media := object{"features": []object{{"name": "prefers-color-scheme", "value": theme}}}
		b.call("POST", "/goog/cdp/execute", nil, object{"cmd": "Emulation.setEmulatedMedia", "params": media})
		for _, width := range []int{1280, 320} {
			screen := object{"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
			b.call("POST", "/goog/cdp/execute", nil, object{"cmd": "Emulation.setDeviceMetricsOverride", "params": screen})
			got := eval[appearance](b, looks)
			if got.Width > width || got.Dark != (theme == "dark") || got.Texts < 1000 || len(got.Faint) > 0 {
				t.Errorf("%s, %d wide: %+v", theme, width, got)
			}
		}
	}

	parts := eval[[]map[string]string](b, `return [...document.querySelectorAll('input, select, textarea, button, summary, section, [role], [tabindex]')]
		.filter((part) => part.checkVisibility() && part.role !== 'status')`)
	for _, part := range parts {
		var name, html string
		if b.call("GET", "/element/"+part[elementKey]+"/computedlabel", &name, nil); name == "" {
			b.call("GET", "/element/"+part[elementKey]+"/property/outerHTML", &html, nil)
			t.Errorf("has no name: %.200s", html)
		}
	}
	b.wantQuiet()
}

// appearance is what looks returns.
type appearance struct {
	Width, Texts int
	Dark         bool
	Faint        []string
}

// looks measures the page: its width, and the contrast (WCAG 2.2, 1.4.3 and
// 1.4.11) of its texts and of the edges of its controls.
const looks = `
const luminance = (color) => {
	const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((c) => c / 255)
		.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
	return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
	const color = element ? getComputedStyle(element).backgroundColor : 'rgb(255, 255, 255)';
	return color === 'rgba(0, 0, 0, 0)' ? behind(element.parentElement) : color;
};
const contrast = (...colors) => (Math.max(...colors.map(luminance)) + 0.05) / (Math.min(...colors.map(luminance)) + 0.05);
// The page's policy forbids style elements, but not sheets that a script adopts.
const sheet = new CSSStyleSheet();
sheet.replaceSync('* { line-height: 1.5 !important; letter-spacing: 0.12em !important; word-spacing: 0.16em !important } p { margin-bottom: 2em !important }');
document.adoptedStyleSheets = innerWidth < 500 ? [sheet] : [];
const result = { width: document.documentElement.scrollWidth, dark: luminance(behind(document.body)) < 0.2, texts: 0, faint: [] };
if (document.documentElement.lang !== 'en') result.faint.push('its language is not named (3.1.1)');
for (const element of document.body.querySelectorAll('*')) {
	const { color, borderTopColor } = getComputedStyle(element);
	const control = element.matches('input, select, textarea, button');
	const says = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
	if (!element.checkVisibility() || !control && !says) continue;
	result.texts++;
	const around = behind(element.parentElement);
	const edge = Math.max(contrast(borderTopColor, around), contrast(behind(element), around));
	if (contrast(color, behind(element)) >= 4.5 && (!control || edge >= 3)) continue;
	result.faint.push(element.tagName + ': ' + element.textContent.slice(0, 40));
}
return result;`

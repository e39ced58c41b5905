package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"math"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
	"weak"
)

func TestMetricsZeroValue(t *testing.T) {
	var m metrics
	got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))
	for _, name := range []string{"http_requests_in_flight", "go_sql_wait_count_total", "go_goroutines", "go_threads", "go_memstats_alloc_bytes",
		"go_memstats_alloc_bytes_total", "go_memstats_heap_objects", "go_memstats_next_gc_bytes", "go_memstats_stack_inuse_bytes", "go_memstats_sys_bytes",
		`go_info{version="` + runtime.Version() + `"}`} {
		if _, ok := got[name]; !ok {
			t.Errorf("no %s", name)
		}
	}
	for series := range got {
		if strings.HasPrefix(series, "http_request_") || strings.HasPrefix(series, "http_requests_total") {
			t.Errorf("%s, but nothing was observed", series)
		}
	}
	if b := m.appendTo([]byte("# before\n"), sql.DBStats{}); !bytes.HasPrefix(b, []byte("# before\n# HELP ")) {
		t.Errorf("appended page begins %.30q", b)
	}
}

// Requests are counted exactly, and each page that is read meanwhile is in
// itself consistent and never behind the one before.
func TestMetricsConcurrent(t *testing.T) {
	const goroutines, rounds, d = 8, 30_000, time.Minute
	var m metrics
	var served sync.WaitGroup
	for range goroutines {
		served.Go(func() {
			for i := range rounds {
				m.inFlight.Add(1)
				m.observe([]string{"/api/tasks", "/api/tasks/{id}", noRoute}[i%3], "GET", 200, d)
				m.observe("/api/tasks", "POST", []int{201, 422}[i%2], d)
				m.inFlight.Add(-1)
			}
		})
	}
	done := make(chan struct{})
	go func() {
		served.Wait()
		close(done)
	}()
	last := map[string]float64{}
	for finished := false; !finished; {
		select {
		case <-done:
			finished = true
		default:
		}
		got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))
		for series, v := range got {
			name, labels, _ := strings.Cut(series, "{")
			if strings.HasPrefix(name, "http_request_") && v < last[series] {
				t.Fatalf("%s fell from %v to %v", series, last[series], v)
			}
			if sum := got["http_request_duration_seconds_sum{"+labels]; name == "http_request_duration_seconds_count" && sum < v*d.Seconds() {
				t.Fatalf("%s is %v, but the sum is only %v", series, v, sum)
			}
			if total := got["http_requests_total{"+labels]; name == "http_request_duration_seconds_count" && total != v {
				t.Fatalf("%s is %v, but the total is %v", series, v, total)
			}
		}
		last = got
	}

	for labels, want := range map[string]float64{
		`route="/api/tasks",method="GET",status="200"`:      goroutines * rounds / 3,
		`route="/api/tasks/{id}",method="GET",status="200"`: goroutines * rounds / 3,
		`route="unmatched",method="GET",status="200"`:       goroutines * rounds / 3,
		`route="/api/tasks",method="POST",status="201"`:     goroutines * rounds / 2,
		`route="/api/tasks",method="POST",status="422"`:     goroutines * rounds / 2,
	} {
		if got := last["http_requests_total{"+labels+"}"]; got != want {
			t.Errorf("total of %s = %v, want %v", labels, got, want)
		}
		if got := last["http_request_duration_seconds_sum{"+labels+"}"]; math.Abs(got-want*d.Seconds()) > 1e-9 {
			t.Errorf("sum of %s = %v, want %v", labels, got, want*d.Seconds())
		}
	}
	if got := last["http_requests_in_flight"]; got != 0 {
		t.Errorf("in flight = %v, want 0", got)
	}
}

// Several goroutines make the same series at once, and none is lost.
func TestMetricsConcurrentFirst(t *testing.T) {
	for range 2000 {
		var m metrics
		var served sync.WaitGroup
		start := make(chan struct{})
		for range 4 {
			served.Go(func() {
				<-start
				m.observe("/", "GET", 200, 0)
			})
		}
		close(start)
		served.Wait()
		if want := []byte("http_requests_total{route=\"/\",method=\"GET\",status=\"200\"} 4\n"); !bytes.Contains(m.appendTo(nil, sql.DBStats{}), want) {
			t.Fatalf("no %s", want)
		}
	}
}

func TestMetricsInFlight(t *testing.T) {
	var m metrics
	m.inFlight.Add(3)
	if got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))["http_requests_in_flight"]; got != 3 {
		t.Errorf("in flight = %v, want 3", got)
	}
}

func TestMetricsBuckets(t *testing.T) {
	for _, tt := range []struct {
		d    time.Duration
		want string // the first bucket that counts d
	}{
		{0, "0.001"},
		{time.Millisecond, "0.001"},
		{time.Millisecond + 1, "0.0025"},
		{2500 * time.Microsecond, "0.0025"},
		{5 * time.Millisecond, "0.005"},
		{10 * time.Millisecond, "0.01"},
		{25 * time.Millisecond, "0.025"},
		{50 * time.Millisecond, "0.05"},
		{100 * time.Millisecond, "0.1"},
		{250 * time.Millisecond, "0.25"},
		{500 * time.Millisecond, "0.5"},
		{time.Second, "1"},
		{2500 * time.Millisecond, "2.5"},
		{5 * time.Second, "5"},
		{5*time.Second + 1, "+Inf"},
		{math.MaxInt64, "+Inf"},
	} {
		var m metrics
		m.observe("/", "GET", 200, tt.d)
		page := string(m.appendTo(nil, sql.DBStats{}))
		_, after, _ := strings.Cut(page, "} 1\nhttp_request_duration_seconds_sum")
		if after == "" {
			t.Fatalf("%v is in no bucket:\n%s", tt.d, page)
		}
		for line := range strings.Lines(page) {
			labels, ok := strings.CutPrefix(line, `http_request_duration_seconds_bucket{route="/",method="GET",status="200",le=`)
			if ok && strings.HasSuffix(labels, "} 1\n") {
				if want := strconv.Quote(tt.want) + "} 1\n"; labels != want {
					t.Errorf("%v is first counted at le=%s, want %s", tt.d, labels, want)
				}
				break
			}
		}
	}
}

// The labels of a series are not the client's to choose.
func TestMetricsLabelSet(t *testing.T) {
	var m metrics
	methods := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}
	for _, method := range methods {
		m.observe("/", method, 200, 0)
	}
	for i := range 10_000 {
		m.observe(noRoute, fmt.Sprintf("M%d", i), 404, 0)
	}
	m.observe(noRoute, "", 404, 0)
	m.observe(noRoute, "get", 404, 0)

	got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))
	n := 0
	for series := range got {
		if strings.HasPrefix(series, "http_requests_total{") {
			n++
		}
	}
	if n != len(methods)+1 {
		t.Errorf("%d series, want %d", n, len(methods)+1)
	}
	for _, method := range methods {
		if v := got[fmt.Sprintf(`http_requests_total{route="/",method="%s",status="200"}`, method)]; v != 1 {
			t.Errorf("%s was counted %v times", method, v)
		}
	}
	if v := got[`http_requests_total{route="unmatched",method="other",status="404"}`]; v != 10_002 {
		t.Errorf("other methods were counted %v times, want 10002", v)
	}
}

// A method that net/http hands out is a part of the request line, which a
// series must not keep alive.
func TestMetricsKeepNoRequestLine(t *testing.T) {
	var m metrics
	line := strings.Repeat("GET /", 1<<16)
	pointer := weak.Make(unsafe.StringData(line))
	m.observe("/", line[:3], 200, 0)
	runtime.GC()
	if pointer.Value() != nil {
		t.Error("the request line is still in memory")
	}
	runtime.KeepAlive(&m)
}

// The order does not depend on what came first.
func TestMetricsOrder(t *testing.T) {
	var pages [2]string
	for i := range pages {
		var m metrics
		routes := []string{"/a", "/b", "/c", "/d", "/e", "/f"}
		if i == 1 {
			slices.Reverse(routes)
		}
		for _, route := range routes {
			m.observe(route, "GET", 200, 0)
			m.observe(route, "GET", 404, 0)
		}
		pages[i], _, _ = strings.Cut(string(m.appendTo(nil, sql.DBStats{})), "# HELP go_")
	}
	if pages[0] != pages[1] {
		t.Errorf("one page is\n%s\nthe other\n%s", pages[0], pages[1])
	}
}

func TestMetricsPool(t *testing.T) {
	var m metrics
	got := parseMetrics(t, m.appendTo(nil, sql.DBStats{MaxOpenConnections: 10, OpenConnections: 7, InUse: 4, Idle: 3,
		WaitCount: 21, WaitDuration: 1500 * time.Millisecond, MaxIdleClosed: 22, MaxIdleTimeClosed: 23, MaxLifetimeClosed: 24}))
	pool := map[string]float64{}
	for series, v := range got {
		if strings.HasPrefix(series, "go_sql_") {
			pool[series] = v
		}
	}
	want := map[string]float64{
		"go_sql_max_open_connections":        10,
		"go_sql_open_connections":            7,
		"go_sql_in_use_connections":          4,
		"go_sql_idle_connections":            3,
		"go_sql_wait_count_total":            21,
		"go_sql_wait_duration_seconds_total": 1.5,
		"go_sql_max_idle_closed_total":       22,
		"go_sql_max_idle_time_closed_total":  23,
		"go_sql_max_lifetime_closed_total":   24,
	}
	if !reflect.DeepEqual(pool, want) {
		t.Errorf("pool = %v, want %v", pool, want)
	}
}

func TestMetricsRuntime(t *testing.T) {
	var m metrics
	got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))
	for _, tt := range []struct {
		name     string
		min, max float64
	}{
		{"go_goroutines", 2, 1e6},
		{"go_threads", 1, 1e5},
		{"go_memstats_alloc_bytes", 1 << 10, got["go_memstats_sys_bytes"]},
	} {
		v, ok := got[tt.name]
		if !ok || v < tt.min || v > tt.max {
			t.Errorf("%s = %v, want %v to %v", tt.name, v, tt.min, tt.max)
		}
	}
}

func TestMetricsObserveAllocates(t *testing.T) {
	var m metrics
	if n := testing.AllocsPerRun(1000, func() { m.observe("/api/tasks/{id}", "PROPFIND", 405, time.Millisecond) }); n != 0 {
		t.Errorf("observe allocates %v times", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	var m metrics
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m.observe("/api/tasks/{id}", "PATCH", 200, 3*time.Millisecond)
		}
	})
}

func BenchmarkMetricsPage(b *testing.B) {
	var m metrics
	for i := range 60 {
		m.observe("/api/tasks/{id}", "GET", 200+i, 3*time.Millisecond)
	}
	b.ReportAllocs()
	for b.Loop() {
		m.appendTo(nil, sql.DBStats{})
	}
}

// parseMetrics returns the value of each series of a page, under its name and
// labels as written there. It fails the test when the page is not strictly in
// Prometheus' text format or not in its conventions: each metric once, HELP,
// then TYPE, then its samples; counters end in _total, units are basic ones,
// histograms are complete and cumulative.
func parseMetrics(t testing.TB, page []byte) map[string]float64 {
	t.Helper()
	var (
		head   = regexp.MustCompile(`^# (HELP|TYPE) ([a-z_][a-z0-9_]*) (.+)$`)
		sample = regexp.MustCompile(`^([a-z_][a-z0-9_]*)(\{.+\})? (\S+)$`)
		label  = regexp.MustCompile(`^[{,]([a-z_][a-z0-9_]*)="((?:[^"\\]|\\[n"\\])*)"`)
		unit   = regexp.MustCompile(`_(ns|us|ms|nanoseconds|microseconds|milliseconds|minutes|hours|kilobytes|kb|mb|percent)(_|$)`)
		kinds  = map[string]string{}
		got    = map[string]float64{}
		helped string // the metric whose HELP was the line before
		family string
		order  []string
	)
	if len(page) > 0 && !bytes.HasSuffix(page, []byte("\n")) {
		t.Fatalf("the last line does not end: %.80q", page[max(0, len(page)-80):])
	}
	for line := range strings.Lines(string(page)) {
		line = strings.TrimSuffix(line, "\n")
		if m := head.FindStringSubmatch(line); m != nil && m[1] == "HELP" {
			helped = m[2]
			continue
		} else if m != nil {
			family = m[2]
			if helped != family || kinds[family] != "" {
				t.Fatalf("TYPE of %s without HELP before it, or for the second time", family)
			}
			if (m[3] == "counter") != strings.HasSuffix(family, "_total") || unit.MatchString(family) {
				t.Errorf("%s is no good name for a %s", family, m[3])
			}
			helped, kinds[family] = "", m[3]
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m == nil || helped != "" {
			t.Fatalf("line out of place: %q", line)
		}
		name, labels := m[1], m[2]
		suffix, ok := strings.CutPrefix(name, family)
		allowed := map[string][]string{"counter": {""}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}[kinds[family]]
		if !ok || !slices.Contains(allowed, suffix) {
			t.Fatalf("%q in the %s %s", line, kinds[family], family)
		}
		seen := map[string]bool{}
		for labels != "" && labels != "}" {
			l := label.FindStringSubmatch(labels)
			if l == nil || seen[l[1]] {
				t.Fatalf("bad labels in %q", line)
			}
			seen[l[1]] = true
			labels = labels[len(l[0]):]
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil || v < 0 || math.IsNaN(v) || math.IsInf(v, 0) {
			t.Fatalf("bad value in %q", line)
		}
		series := m[1] + m[2]
		if _, ok := got[series]; ok {
			t.Fatalf("%s occurs twice", series)
		}
		got[series] = v
		order = append(order, series)
	}
	if helped != "" {
		t.Fatalf("%s has no TYPE", helped)
	}
	checkHistograms(t, order, got)
	return got
}

// checkHistograms fails the test unless the buckets of each histogram stand in
// ascending order up to +Inf, never decrease, and agree with the count.
func checkHistograms(t testing.TB, order []string, got map[string]float64) {
	t.Helper()
	bucket := regexp.MustCompile(`^(.+)_bucket\{(.*),le="([^"]+)"\}$`)
	var of string // the histogram that the last bucket was of
	var le, n float64
	for _, series := range order {
		m := bucket.FindStringSubmatch(series)
		if m == nil {
			continue
		}
		if of != m[1]+m[2] {
			of, le, n = m[1]+m[2], 0, 0
		}
		bound, err := strconv.ParseFloat(m[3], 64)
		if err != nil || bound <= le || got[series] < n {
			t.Fatalf("%s %v comes after le=%v %v", series, got[series], le, n)
		}
		le, n = bound, got[series]
		count, ok := got[m[1]+"_count{"+m[2]+"}"]
		_, summed := got[m[1]+"_sum{"+m[2]+"}"]
		_, whole := got[m[1]+"_bucket{"+m[2]+`,le="+Inf"}`]
		if !ok || !summed || !whole || math.IsInf(bound, 0) && n != count {
			t.Fatalf("%s %v in a histogram that is incomplete or counts %v", series, n, count)
		}
	}
}

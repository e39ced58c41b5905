package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"math"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"
	"weak"
)

// A page has the pool, the runtime, and nothing that was not observed.
func TestMetricsPage(t *testing.T) {
	var m metrics
	m.inFlight.Add(3)
	pool := sql.DBStats{MaxOpenConnections: 10, OpenConnections: 7, InUse: 4, Idle: 3,
		WaitCount: 21, WaitDuration: 1500 * time.Millisecond}
	got := parseMetrics(t, m.appendTo(nil, pool))
	most := got["go_memstats_sys_bytes"]
	for name, want := range map[string][2]float64{ // at least, at most
		"http_requests_in_flight":                      {3, 3},
		"go_sql_max_open_connections":                  {10, 10},
		"go_sql_open_connections":                      {7, 7},
		"go_sql_in_use_connections":                    {4, 4},
		"go_sql_idle_connections":                      {3, 3},
		"go_sql_wait_count_total":                      {21, 21},
		"go_sql_wait_duration_seconds_total":           {1.5, 1.5},
		"go_goroutines":                                {2, 1e6},
		"go_memstats_alloc_bytes":                      {1 << 10, most},
		"go_memstats_alloc_bytes_total":                {1 << 10, 1e15},
		"go_memstats_next_gc_bytes":                    {1 << 10, 1e15},
		"go_memstats_sys_bytes":                        {1 << 20, 1e15},
		`go_info{version="` + runtime.Version() + `"}`: {1, 1},
	} {
		if v, ok := got[name]; !ok || v < want[0] || v > want[1] {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
		delete(got, name)
	}
	if b := m.appendTo([]byte("# before\n"), pool); len(got) > 0 || !bytes.HasPrefix(b, []byte("# before\n# HELP ")) {
		t.Errorf("there is more: %v, or the page begins %.30q", got, b)
	}
}

// Requests are counted exactly, and each page that is read meanwhile is in
// itself consistent and never behind the one before.
func TestMetricsConcurrent(t *testing.T) {
	const goroutines, rounds, d = 8, 30_000, time.Minute
	var m metrics
	done := make(chan struct{})
	go func() {
		defer close(done)
		together(goroutines, func(int) {
			for i := range rounds {
				m.inFlight.Add(1)
				m.observe([]string{"/api/tasks", "/api/tasks/{id}", noRoute}[i%3], "GET", 200, d)
				m.observe("/api/tasks", "POST", []int{201, 422}[i%2], d)
				m.inFlight.Add(-1)
			}
		})
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
			sum, total := got["http_request_duration_seconds_sum{"+labels], got["http_requests_total{"+labels]
			if strings.HasPrefix(name, "http_request_") && v < last[series] || name == "http_request_duration_seconds_count" && (sum < v*d.Seconds() || total != v) {
				t.Fatalf("%s is %v after %v, with a sum of %v and a total of %v", series, v, last[series], sum, total)
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
		total, sum := last["http_requests_total{"+labels+"}"], last["http_request_duration_seconds_sum{"+labels+"}"]
		if total != want || math.Abs(sum-want*d.Seconds()) > 1e-9 || last["http_requests_in_flight"] != 0 {
			t.Errorf("%s: total %v, sum %v, want %v", labels, total, sum, want)
		}
	}
}

// Several goroutines make the same series at once, and none is lost.
func TestMetricsConcurrentFirst(t *testing.T) {
	for range 2000 {
		var m metrics
		together(4, func(int) { m.observe("/", "GET", 200, 0) })
		if want := []byte("http_requests_total{route=\"/\",method=\"GET\",status=\"200\"} 4\n"); !bytes.Contains(m.appendTo(nil, sql.DBStats{}), want) {
			t.Fatalf("no %s", want)
		}
	}
}

// A bucket counts what takes as long as its bound, and what takes longer is in
// the next.
func TestMetricsBuckets(t *testing.T) {
	all := strings.Fields("0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 +Inf")
	check := func(d time.Duration, want int) {
		t.Helper()
		var m metrics
		m.observe("/", "GET", 200, d)
		got := parseMetrics(t, m.appendTo(nil, sql.DBStats{}))
		first := slices.IndexFunc(all, func(le string) bool {
			return got[`http_request_duration_seconds_bucket{route="/",method="GET",status="200",le="`+le+`"}`] == 1
		})
		if first != want {
			t.Errorf("%v is first counted in bucket %d, want %d", d, first, want)
		}
	}
	check(0, 0)
	check(math.MaxInt64, 12)
	for i, le := range all[:12] {
		bound, _ := time.ParseDuration(le + "s")
		check(bound, i)
		check(bound+1, i+1)
	}
}

// The labels of a series are not the client's to choose, and the order of series
// does not depend on what came first.
func TestMetricsLabels(t *testing.T) {
	methods := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}
	want := map[string]float64{`http_requests_total{route="unmatched",method="other",status="404"}`: 10_002}
	var pages [2]string
	for i := range pages {
		var m metrics
		for _, method := range methods {
			m.observe("/", method, 200, 0)
			want[`http_requests_total{route="/",method="`+method+`",status="200"}`] = 1
		}
		for i := range 10_000 {
			m.observe(noRoute, fmt.Sprintf("M%d", i), 404, 0)
		}
		m.observe(noRoute, "", 404, 0)
		m.observe(noRoute, "get", 404, 0)
		page := m.appendTo(nil, sql.DBStats{})
		for series, v := range parseMetrics(t, page) {
			if strings.HasPrefix(series, "http_requests_total{") && v != want[series] {
				t.Errorf("%s is %v, want %v", series, v, want[series])
			}
		}
		pages[i], _, _ = strings.Cut(string(page), "# HELP go_")
		slices.Reverse(methods)
	}
	if pages[0] != pages[1] || strings.Count(pages[0], "http_requests_total{") != len(want) {
		t.Errorf("one page is\n%s\nthe other\n%s", pages[0], pages[1])
	}
}

// A method that net/http hands out is a part of the request line, which a
// series must not keep alive. Only a new series allocates.
func TestMetricsMemory(t *testing.T) {
	var m metrics
	line := strings.Repeat("GET /", 1<<16)
	pointer := weak.Make(unsafe.StringData(line))
	m.observe("/", line[:3], 200, 0)
	runtime.GC()
	if pointer.Value() != nil {
		t.Error("the request line is still in memory")
	}
	if n := testing.AllocsPerRun(1000, func() { m.observe("/", "PROPFIND", 405, time.Millisecond) }); n != 0 {
		t.Errorf("observe allocates %v times", n)
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
	for line := range strings.Lines(string(page)) {
		line, whole := strings.CutSuffix(line, "\n")
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
		if m == nil || helped != "" || !whole {
			t.Fatalf("line out of place: %q", line)
		}
		labels, series := m[2], m[1]+m[2]
		suffix, ok := strings.CutPrefix(m[1], family)
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
		if _, twice := got[series]; err != nil || !(v >= 0) || math.IsInf(v, 0) || twice {
			t.Fatalf("bad value, or the second one, in %q", line)
		}
		got[series] = v
		order = append(order, series)
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

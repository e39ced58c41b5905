package main

// metrics.go counts requests, and writes what Prometheus scrapes: these counts,
// the connection pool and the Go runtime.

import (
	"database/sql"
	"fmt"
	"maps"
	"math"
	"runtime"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics counts the requests that a handler serves. The zero value is ready to
// use, by any number of goroutines.
type metrics struct {
	inFlight atomic.Int64 // requests being served
	series   sync.Map     // labels → *series
}

// labels distinguish series. A series is never removed, so a client must not be
// able to choose a label.
type labels struct {
	route, method string
	status        int
}

// series is a histogram of the durations of requests with the same labels.
type series struct {
	labels  string // in Prometheus' format
	sum     atomic.Int64
	buckets [len(bounds)]atomic.Int64 // not cumulative
}

// bounds are the longest durations that the buckets hold, in seconds.
var bounds = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, math.Inf(1)}

// observe counts a request. The route is the path of its pattern. Methods that
// HTTP does not define count as "other". It allocates only for a new series.
func (m *metrics) observe(route, method string, status int, d time.Duration) {
	if !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}, method) {
		method = "other"
	}
	key := labels{route, method, status}
	v, ok := m.series.Load(key)
	if !ok {
		key.method = strings.Clone(method) // net/http's is a part of the whole request line
		v, _ = m.series.LoadOrStore(key, &series{labels: fmt.Sprintf(`route="%s",method="%s",status="%d"`, route, method, status)})
	}
	s := v.(*series)
	i, _ := slices.BinarySearch(bounds[:], d.Seconds())
	s.sum.Add(int64(d)) // first; see appendTo
	s.buckets[i].Add(1)
}

// appendTo appends the metrics in Prometheus' text format 0.0.4, always in the
// same order. Requests are counted meanwhile. Each bucket is read once, so all
// counts of a series agree. The sum is added first and read last, so it covers
// every counted request, and perhaps later ones.
func (m *metrics) appendTo(b []byte, pool sql.DBStats) []byte {
	const total, duration = "http_requests_total", "http_request_duration_seconds"
	all := make(map[string]*series)
	for _, v := range m.series.Range {
		all[v.(*series).labels] = v.(*series)
	}
	requests := fmt.Appendf(nil, "# HELP %s Requests served.\n# TYPE %[1]s counter\n", total)
	durations := fmt.Appendf(nil, "# HELP %s Time to serve a request.\n# TYPE %[1]s histogram\n", duration)
	for _, text := range slices.Sorted(maps.Keys(all)) {
		s, n := all[text], int64(0)
		for i, le := range bounds {
			n += s.buckets[i].Load()
			durations = fmt.Appendf(durations, "%s_bucket{%s,le=\"%v\"} %d\n", duration, text, le, n)
		}
		durations = fmt.Appendf(durations, "%s_sum{%s} %v\n%[1]s_count{%[2]s} %[4]d\n", duration, text, time.Duration(s.sum.Load()).Seconds(), n)
		requests = fmt.Appendf(requests, "%s{%s} %d\n", total, text, n)
	}
	b = appendMetric(b, "http_requests_in_flight", "Requests being served.", float64(m.inFlight.Load()))
	b = append(append(b, requests...), durations...)
	b = appendMetric(b, "go_sql_max_open_connections", "Connections that may be open; 0 means any number.", float64(pool.MaxOpenConnections))
	b = appendMetric(b, "go_sql_open_connections", "Open connections, in use or idle.", float64(pool.OpenConnections))
	b = appendMetric(b, "go_sql_in_use_connections", "Connections in use.", float64(pool.InUse))
	b = appendMetric(b, "go_sql_idle_connections", "Idle connections.", float64(pool.Idle))
	b = appendMetric(b, "go_sql_wait_count_total", "Connections waited for.", float64(pool.WaitCount))
	b = appendMetric(b, "go_sql_wait_duration_seconds_total", "Time spent waiting for connections.", pool.WaitDuration.Seconds())
	// The Go runtime: what can be read without stopping the program.
	b = fmt.Appendf(b, "# HELP go_info The version of Go.\n# TYPE go_info gauge\ngo_info{version=%q} 1\n", runtime.Version())
	for _, row := range [...]struct{ name, help, key string }{
		{"go_goroutines", "Goroutines.", "/sched/goroutines:goroutines"},
		{"go_memstats_alloc_bytes", "Memory of heap objects.", "/memory/classes/heap/objects:bytes"},
		{"go_memstats_alloc_bytes_total", "Memory allocated for heap objects.", "/gc/heap/allocs:bytes"},
		{"go_memstats_next_gc_bytes", "Heap size at which the next collection ends.", "/gc/heap/goal:bytes"},
		{"go_memstats_sys_bytes", "Memory obtained from the operating system.", "/memory/classes/total:bytes"},
	} {
		s := []runtimemetrics.Sample{{Name: row.key}}
		runtimemetrics.Read(s)
		b = appendMetric(b, row.name, row.help, float64(s[0].Value.Uint64()))
	}
	return b
}

// appendMetric appends a metric with one sample. It is a counter if its name ends
// in _total, else a gauge.
func appendMetric(b []byte, name, help string, v float64) []byte {
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	b = fmt.Appendf(b, "# HELP %s %s\n# TYPE %[1]s %[3]s\n%[1]s ", name, help, kind)
	return append(strconv.AppendFloat(b, v, 'f', -1, 64), '\n')
}

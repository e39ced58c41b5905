package main

// server_test.go stops servers in many ways, and looks for requests that are lost.

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// serve starts a server for outer, or for the service itself. From then on a is
// the service by way of this server. Serve's error is sent to ended.
func (a *api) serve(outer http.Handler) (server *Server, ended <-chan error) {
	a.Helper()
	listener := listen(a, "127.0.0.1:0")
	server = NewServer(outer, a.Handler)
	a.Cleanup(func() { server.Close() })
	a.url = "http://" + listener.Addr().String()
	errs := make(chan error, 1)
	go func() { errs <- server.Serve(listener) }()
	return server, errs
}

// flipLocked sends a request whose statement waits until unlock is called.
// The status of the response, 0 if there is none, is sent to status.
func (a *api) flipLocked() (unlock func(), status <-chan int) {
	a.Helper()
	id := a.newTasks(1)[0]
	unlock = lockTasks(a, a.dbURL, lockRow, id)
	result := make(chan int, 1)
	req, _ := http.NewRequest("PATCH", a.url+"/api/tasks/"+id+"/complete", nil)
	go func() {
		resp, err := new(http.Transport).RoundTrip(req)
		if err != nil {
			result <- 0
			return
		}
		resp.Body.Close()
		result <- resp.StatusCode
	}()
	waitFor(a, "the statement to wait", func() bool { return waiting(a, a.dbURL) == 1 })
	return unlock, result
}

// While a request is in flight, a server that shuts down accepts connections and
// serves all requests, but is not ready.
func TestShutdownWaits(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: patience})
	server, ended := a.serve(a.Handler)
	unlock, flipped := a.flipLocked()
	a.want(http.StatusOK, a.do("GET", "/readyz", ""))
	result := make(chan error, 1)
	go func() { result <- server.Shutdown(t.Context()) }()
	waitFor(t, "the service not to be ready", func() bool { return a.do("GET", "/readyz", "").StatusCode != http.StatusOK })
	for range 20 {
		got := a.want(http.StatusServiceUnavailable, a.do("GET", "/readyz", ""))
		if !got.Close {
			t.Fatal("the connection would be used again")
		}
		a.create(`{"title": "while another request is in flight"}`)
	}
	select {
	case err := <-result:
		t.Fatalf("Shutdown returned (%v) with a request in flight", err)
	case err := <-ended:
		t.Fatalf("Serve returned (%v) with a request in flight", err)
	default:
	}
	unlock()
	if got := <-flipped; got != http.StatusOK {
		t.Errorf("the request in flight: status %d", got)
	}
	for _, err := range []error{<-result, server.Shutdown(t.Context())} {
		if err != nil {
			t.Errorf("Shutdown: %v", err)
		}
	}
	for _, err := range []error{<-ended, server.Serve(listen(t, "127.0.0.1:0"))} {
		if err != http.ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	}
	if conn, err := net.Dial("tcp", server.listeners[0].Addr().String()); err == nil {
		conn.Close()
		t.Error("there is still a listener")
	}
}

// When its context ends, Shutdown gives up, and leaves no statement behind.
func TestShutdownTimeout(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{RequestTimeout: patience})
	server, ended := a.serve(a.Handler)
	_, flipped := a.flipLocked()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := server.Shutdown(ctx); err != context.DeadlineExceeded {
		t.Errorf("Shutdown: %v", err)
	}
	if err := <-ended; err != http.ErrServerClosed {
		t.Errorf("Serve: %v", err)
	}
	if got := <-flipped; got != 0 {
		t.Errorf("the request in flight: status %d", got)
	}
	waitFor(t, "its statement to end", func() bool { return waiting(t, a.dbURL) == 0 })
}

// Connections that are not used, as browsers open them in advance, and bodies that
// are refused and do not come, do not hold up Shutdown.
func TestShutdownIdleClients(t *testing.T) {
	t.Parallel()
	// net/http alone waits 5 s for a request on a new connection.
	for sent, limit := range map[string]time.Duration{"": 4 * time.Second,
		"POST /healthz HTTP/1.1\r\nHost: h\r\nContent-Length: 13\r\n\r\n": promptly, "POST /nope HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n": promptly} {
		t.Run(sent, func(t *testing.T) {
			t.Parallel()
			a := newAPI(t, Options{})
			server, _ := a.serve(a.Handler)
			conn, err := net.Dial("tcp", strings.TrimPrefix(a.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if io.WriteString(conn, sent); sent != "" {
				conn.Read(make([]byte, 1))
			}
			a.do("GET", "/healthz", "") // on a later connection: the first one has been accepted
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			if err := server.Shutdown(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// client is a way to use the service.
type client struct {
	name, path string
	keeps      bool // its connection, for the next request
	hesitates  bool // before each request
	waits      bool // for a response before it connects again
}

// use sends requests on a connection. It returns an error if one is lost.
func (c client) use(conn net.Conn, responses *atomic.Int64) error {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for n := 1; ; n++ {
		if c.hesitates {
			time.Sleep(10*time.Millisecond + rand.N(30*time.Millisecond))
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", c.path)
		resp, err := http.ReadResponse(r, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		if err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: request %d: %v, %w", c.name, n, resp, err)
		}
		responses.Add(1)
		if !c.keeps || resp.Close {
			return nil
		}
	}
}

// The server answers all requests on the connections that it has accepted. It
// accepts all connections of clients that wait for a response before they connect
// again, unless it has no time to run at all when it closes its listener.
func TestShutdownLosesNoRequest(t *testing.T) {
	t.Parallel()
	a := newAPI(t, Options{})
	mux := http.NewServeMux()
	mux.Handle("/", a.Handler)
	mux.HandleFunc("/slow", func(http.ResponseWriter, *http.Request) {
		time.Sleep(200*time.Millisecond + rand.N(100*time.Millisecond))
	})
	const rounds = 10
	bad := 0
	for range rounds {
		server, listener := NewServer(mux, a.Handler), listen(t, "127.0.0.1:0")
		var accepted sync.Map // the addresses of clients, as keys
		original := server.ConnState
		server.ConnState = func(conn net.Conn, state http.ConnState) {
			accepted.Store(conn.RemoteAddr().String(), nil)
			original(conn, state)
		}
		go server.Serve(listener)
		var clients sync.WaitGroup
		var responses, reset atomic.Int64
		for _, c := range []client{
			{"keep", "/healthz", true, false, true},
			{"connect for each", "/healthz", false, false, true},
			{"keep, hesitate", "/healthz", true, true, true},
			{"connect, hesitate", "/healthz", false, true, true},
			{"slow", "/slow", true, true, true},
			{"arrive", "/healthz", false, true, false},
		} {
			use := func(conn net.Conn) {
				err := c.use(conn, &responses)
				if _, ok := accepted.Load(conn.LocalAddr().String()); err != nil && ok {
					t.Error(err)
				} else if err != nil && c.waits {
					reset.Add(1)
				}
			}
			for range 4 {
				clients.Go(func() {
					for {
						conn, err := net.Dial("tcp", listener.Addr().String())
						if err != nil {
							return // without having sent a request
						}
						if c.waits {
							use(conn)
							continue
						}
						clients.Go(func() { use(conn) })
						time.Sleep(rand.N(20 * time.Millisecond))
					}
				})
			}
		}
		waitFor(t, "responses", func() bool { return responses.Load() > 200 })
		if err := server.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		clients.Wait()
		if reset.Load() > 0 {
			bad++
		}
	}
	if bad > rounds/3 {
		t.Errorf("in %d of %d rounds connections were reset before they were accepted", bad, rounds)
	}
}

// A connection without progress is closed. These times are too long to wait for.
func TestServerTimeouts(t *testing.T) {
	t.Parallel()
	server := NewServer(nil, NewHandler(nil, Options{}))
	for name, timeout := range map[string]time.Duration{
		"headers":           server.ReadHeaderTimeout,
		"headers and body":  server.ReadTimeout,
		"headers, response": server.ReadHeaderTimeout + server.WriteTimeout,
	} {
		if timeout <= 0 || timeout > time.Minute {
			t.Errorf("%s: %v, want at most a minute", name, timeout)
		}
	}
	if !server.DisableGeneralOptionsHandler {
		t.Error("OPTIONS * does not reach the handler")
	}
	if server.ReadTimeout >= server.WriteTimeout {
		t.Error("no time to tell that a body is late")
	}
	if server.IdleTimeout <= 10*time.Minute {
		t.Errorf("idle connections: %v, want more than load balancers keep theirs", server.IdleTimeout)
	}
}

func listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

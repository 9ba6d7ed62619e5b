// SPDX-License-Identifier: Apache-2.0
/* Listening sockets: accept with limits. When file descriptors run out, a reserved one is spent to tell the
 * client at once. */
#include "common/clock.h"
#include "common/log.h"
#include "router/net/net_int.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BACKLOG = 1024, ACCEPTS_PER_EVENT = 64, LOG_EVERY_US = 1000000 };

static void peer_name(const struct sockaddr_storage *a, char *out, size_t n)
{
    char ip[INET6_ADDRSTRLEN] = "?";
    if (a->ss_family == AF_INET) {
        const struct sockaddr_in *v4 = (const void *)a;
        inet_ntop(AF_INET, &v4->sin_addr, ip, sizeof ip);
        snprintf(out, n, "%s:%u", ip, (unsigned)ntohs(v4->sin_port));
    } else if (a->ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const void *)a;
        inet_ntop(AF_INET6, &v6->sin6_addr, ip, sizeof ip);
        snprintf(out, n, "[%s]:%u", ip, (unsigned)ntohs(v6->sin6_port));
    } else {
        snprintf(out, n, "?");
    }
}

static bool may_log(td_net *n)
{
    int64_t now = td_now_us();
    if (n->accept_log_us && now - n->accept_log_us < LOG_EVERY_US) return false;
    n->accept_log_us = now;
    return true;
}

/* No descriptor left: give up the reserved one, take the connection with it, drop it. Leaving it in the
 * backlog would spin. */
static void accept_without_fd(td_net *n, int fd)
{
    if (may_log(n)) TD_WARN("net: out of file descriptors, refusing connections");
    if (n->reserve_fd >= 0) close(n->reserve_fd);
    int s = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (s >= 0) close(s);
    n->counts.refused++;
    n->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
}

static void on_accept(evutil_socket_t fd, short what, void *arg)
{
    td_net *n = arg;
    (void)what;
    for (int i = 0; i < ACCEPTS_PER_EVENT; i++) {
        struct sockaddr_storage a = {0};
        socklen_t len = sizeof a;
        int s = accept4((int)fd, (struct sockaddr *)&a, &len, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (s < 0) {
            if (errno == EINTR || errno == ECONNABORTED) continue;
            if (errno == EMFILE || errno == ENFILE) accept_without_fd(n, (int)fd);
            else if (errno != EAGAIN && may_log(n)) TD_WARN("net: accept: %s", strerror(errno));
            return;
        }
        int over = n->n_conns - n->o.max_connections;
        if (over >= 0 && may_log(n)) TD_WARN("net: %d connections, refusing more", n->n_conns);
        if (over >= TD_NET_REFUSED_CONNECTIONS) {
            close(s);
            n->counts.refused++;
            continue;
        }
        char peer[64];
        peer_name(&a, peer, sizeof peer);
        SSL *ssl = n->tls ? tls_accept(n, s) : NULL;
        if (n->tls && !ssl) close(s);
        else conn_open(n, s, ssl, peer, over >= 0);
    }
}

static int bind_one(td_net *n, const struct addrinfo *a)
{
    int one = 1, fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (n->o.reuse_port) setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (!bind(fd, a->ai_addr, a->ai_addrlen) && !listen(fd, BACKLOG)) return fd;
    int e = errno;
    close(fd);
    errno = e;
    return -1;
}

static td_status open_port(td_net *n, int i, int port)
{
    char service[16];
    snprintf(service, sizeof service, "%d", port);
    struct addrinfo hint = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV},
                    *list = NULL;
    int e = getaddrinfo(n->host[0] ? n->host : NULL, service, &hint, &list);
    if (e) return td_fail(TD_EIO, "listen address \"%s\": %s", n->host, gai_strerror(e));
    int fd = -1;
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) fd = bind_one(n, a);
    e = errno;
    freeaddrinfo(list);
    if (fd < 0) return td_fail(TD_EIO, "cannot listen on %s port %d: %s", n->host, port, strerror(e));
    struct sockaddr_storage bound = {0};
    socklen_t len = sizeof bound;
    getsockname(fd, (struct sockaddr *)&bound, &len);
    n->port[i] = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                   : ((struct sockaddr_in *)&bound)->sin_port);
    n->listen_fd[i] = fd;
    n->listen_ev[i] = event_new(n->base, fd, EV_READ | EV_PERSIST, on_accept, n);
    if (!n->listen_ev[i] || event_add(n->listen_ev[i], NULL))
        return td_fail(TD_EIO, "cannot watch the listening socket");
    return TD_OK;
}

td_status listen_open(td_net *n)
{
    n->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    TD_TRY(open_port(n, 0, n->o.port));
    if (n->o.grpc_port >= 0) TD_TRY(open_port(n, 1, n->o.grpc_port));
    return TD_OK;
}

void listen_end(td_net *n)
{
    for (int i = 0; i < 2; i++)
        if (n->listen_fd[i] >= 0) on_accept(n->listen_fd[i], EV_READ, n);
    listen_close(n);
}

void listen_close(td_net *n)
{
    for (int i = 0; i < 2; i++) {
        if (n->listen_ev[i]) event_free(n->listen_ev[i]);
        if (n->listen_fd[i] >= 0) close(n->listen_fd[i]);
        n->listen_ev[i] = NULL;
        n->listen_fd[i] = -1;
    }
    if (n->reserve_fd >= 0) close(n->reserve_fd);
    n->reserve_fd = -1;
}

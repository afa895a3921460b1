/* What each call on a socket says to addresses, lengths, messages and descriptors that are good or none: a line each. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { ROOM = 512 };

static unsigned short tcp_port, udp_port;
static int listener;
static char *page; /* readable; the next one is nobody's */

static void say(const char *socket, const char *call, const char *what, long length, long got) {
	printf("%s %s %s %ld: %s\n", socket, call, what, length, got < 0 ? strerrorname_np(errno) : "ok");
}

/* Sockets. */
static const struct { const char *name; int domain, type, protocol; } kinds[] = {
	{ "tcp", AF_INET, SOCK_STREAM, 0 },      { "tcp6", AF_INET6, SOCK_STREAM, 0 },
	{ "udp", AF_INET, SOCK_DGRAM, 0 },       { "udp6", AF_INET6, SOCK_DGRAM, 0 },
	{ "unix", AF_UNIX, SOCK_STREAM, 0 },     { "unix-datagrams", AF_UNIX, SOCK_DGRAM, 0 },
	{ "netlink", AF_NETLINK, SOCK_DGRAM, 0 }, { "file", -1, 0, 0 }, { "closed", -2, 0, 0 }, { "none", -3, 0, 0 },
};
enum { KINDS = sizeof kinds / sizeof *kinds, UNIX = 4, FILE_ = 7 };

static int make(int kind, int flags) {
	int fd;
	if (kinds[kind].domain >= 0) return socket(kinds[kind].domain, kinds[kind].type | flags, kinds[kind].protocol);
	if (kinds[kind].domain == -3) return -1;
	fd = open("/dev/null", O_RDWR);
	if (kinds[kind].domain == -2) close(fd), fd = 77;
	return fd;
}

/* Addresses. */
static char room[ROOM];

static void *v4(const char *ip, unsigned short port, int family) {
	struct sockaddr_in *a = (void *)room;
	memset(room, 0, ROOM), a->sin_family = family, a->sin_port = htons(port), inet_pton(AF_INET, ip, &a->sin_addr);
	return room;
}

static void *v6(const char *ip, unsigned short port, int scope) {
	struct sockaddr_in6 *a = (void *)room;
	memset(room, 0, ROOM), a->sin6_family = AF_INET6, a->sin6_port = htons(port), a->sin6_scope_id = scope;
	inet_pton(AF_INET6, ip, &a->sin6_addr);
	return room;
}

static void *path(const char *where) {
	struct sockaddr_un *a = (void *)room;
	memset(room, 0, ROOM), a->sun_family = AF_UNIX, strcpy(a->sun_path, where);
	return room;
}

enum { GOOD, GOOD6, UNSPEC, MAPPED, ODD, EVERY_LENGTH = ODD + 1 };
static const char *addresses[] = {
	"v4", "v6", "unspecified", "v4-mapped", "family-99",
	"null", "page-zero", "nobody's-page", "kernel's-page", "top", "over-the-edge", "unreadable",
	"v4-port-0", "v4-any", "v4-broadcast", "v4-multicast", "v4-class-e", "v4-unspecified-any", "v6-any",
	"v6-link-local", "v6-link-local-of-nothing", "v6-multicast", "v6-port-0", "path", "abstract", "packet", "netlink",
};
enum { ADDRESSES = sizeof addresses / sizeof *addresses };

static void *address(int which, unsigned short port) {
	switch (which) {
	case GOOD: return v4("127.0.0.1", port, AF_INET);
	case GOOD6: return v6("::1", port, 0);
	case UNSPEC: return v4("127.0.0.1", port, AF_UNSPEC);
	case MAPPED: return v6("::ffff:127.0.0.1", port, 0);
	case ODD: return v4("127.0.0.1", port, 99);
	case 5: return NULL;
	case 6: return (void *)16;
	case 7: return (void *)0x1000000000;
	case 8: return (void *)0xffff888000000000;
	case 9: return (void *)-8;
	case 10: return memcpy(page + 4096 - 8, v4("127.0.0.1", port, AF_INET), 8);
	case 11: return page + 4096;
	case 12: return v4("127.0.0.1", 0, AF_INET);
	case 13: return v4("0.0.0.0", port, AF_INET);
	case 14: return v4("255.255.255.255", port, AF_INET);
	case 15: return v4("224.0.0.251", port, AF_INET);
	case 16: return v4("240.0.0.1", port, AF_INET);
	case 17: return v4("0.0.0.0", port, AF_UNSPEC);
	case 18: return v6("::", port, 0);
	case 19: return v6("fe80::1", port, 0);
	case 20: return v6("fe80::1", port, 4711);
	case 21: return v6("ff02::1", port, 0);
	case 22: return v6("::1", 0, 0);
	case 23: return path("/nowhere/at/all");
	case 24: return path(""), strcpy(room + 3, "nobody-here"), room;
	case 25: return v4("127.0.0.1", port, AF_PACKET);
	default: return v4("0.0.0.0", 0, AF_NETLINK);
	}
}

static const long every[] = { 0, 1, 2, 3, 7, 8, 15, 16, 17, 23, 24, 27, 28, 29, 110, 111, 127, 128, 129, 256, 0x7fffffff, 0x80000000, -1 };
static const long some[] = { 0, 2, 16, 28, 129, -1 };

/* Calls with an address. */
static long named(int call, int fd, void *at, long length) {
	struct iovec part = { "x", 1 };
	struct msghdr message = { at, length, &part, 1 };
	struct mmsghdr two[2] = { { { NULL, 0, &part, 1 } }, { { NULL, 0, &part, 1 } } };
	switch (call) {
	case 0: return connect(fd, at, length);
	case 1: return bind(fd, at, length);
	case 2: return sendto(fd, "x", 1, MSG_NOSIGNAL, at, length);
	case 3: return sendmsg(fd, &message, MSG_NOSIGNAL);
	case 4: return two[0].msg_hdr = message, sendmmsg(fd, two, 1, MSG_NOSIGNAL);
	default: return sendto(fd, "x", 1, MSG_NOSIGNAL | MSG_FASTOPEN, at, length);
	}
}

static const char *calls[] = { "connect", "bind", "sendto", "sendmsg", "sendmmsg", "fast-open" };

static void with_address(int kind, int call, int which, long length, int flags) {
	int datagrams = kinds[kind].type == SOCK_DGRAM, fd = make(kind, flags);
	void *at = address(which, call == 1 ? 0 : datagrams ? udp_port : tcp_port);
	long got = named(call, fd, at, length);
	say(kinds[kind].name, calls[call], addresses[which], length, got);
	if (fd >= 0 && fd != 77) close(fd);
}

static void addressed(void) {
	for (int kind = 0; kind < KINDS; kind++)
		for (int call = 0; call < 6; call++) {
			if (call == 5 && kinds[kind].type != SOCK_STREAM) continue;
			for (int which = 0; which < ADDRESSES; which++) {
				int all = which < EVERY_LENGTH && kind < UNIX, few = kind > UNIX && which > 8;
				const long *lengths = all ? every : some;
				int count = all ? sizeof every / sizeof *every : sizeof some / sizeof *some;
				/* Of a datagram socket and a file one odd address is as good as another. */
				for (int i = 0; i < (few ? 1 : count); i++)
					with_address(kind, call, which, few ? 16 : lengths[i], SOCK_NONBLOCK);
			}
		}
	/* As they are by default: those wait, if only for this host. */
	for (int kind = 0; kind < UNIX; kind++)
		for (int call = 0; call < 5; call++)
			for (int which = 0; which < EVERY_LENGTH; which++) with_address(kind, call, which, which == GOOD6 || which == MAPPED ? 28 : 16, 0);
}

/* Messages. */
static void messages(void) {
	struct iovec part = { "word", 4 }, wild = { (void *)16, 4 }, many[1025];
	struct mmsghdr vector[3];
	union { struct cmsghdr header; char bytes[64]; } control = { .header = { 1000, SOL_SOCKET, SCM_RIGHTS } };
	for (int i = 0; i < 1025; i++) many[i] = (struct iovec){ "x", i < 4 };
	for (int kind = 0; kind < KINDS; kind++) {
		const char *name = kinds[kind].name;
		int stream = kinds[kind].type == SOCK_STREAM;
		for (int connected = 0; connected < 2; connected++) {
			int fd = make(kind, 0), six = kinds[kind].domain == AF_INET6;
			void *at = address(six ? GOOD6 : GOOD, stream ? tcp_port : udp_port);
			struct msghdr good = { connected ? NULL : at, connected ? 0 : six ? 28 : 16, &part, 1 }, m;
			if (connected) {
				if (kind >= UNIX) { if (fd != 77) close(fd); break; }
				connect(fd, at, six ? 28 : 16);
			}
#define TRY(what, how) (m = good, how, say(name, connected ? "sendmsg-connected" : "sendmsg", what, 0, sendmsg(fd, &m, MSG_NOSIGNAL)))
			TRY("good", 0), TRY("no-parts", m.msg_iovlen = 0), TRY("parts-of-null", m.msg_iov = NULL);
			TRY("wild-parts", m.msg_iov = (void *)16), TRY("a-wild-part", m.msg_iov = &wild);
			TRY("1024-parts", (m.msg_iov = many, m.msg_iovlen = 1024)), TRY("1025-parts", (m.msg_iov = many, m.msg_iovlen = 1025));
			TRY("parts-without-end", m.msg_iovlen = -1), TRY("control-of-null", m.msg_controllen = 32);
			TRY("wild-control", (m.msg_control = (void *)16, m.msg_controllen = 32));
			TRY("control-too-long", (m.msg_control = &control, m.msg_controllen = 1 << 30));
			TRY("control-without-end", (m.msg_control = &control, m.msg_controllen = -1));
			TRY("control-that-lies", (m.msg_control = &control, m.msg_controllen = 64));
			TRY("control-cut", (m.msg_control = &control, m.msg_controllen = 8));
			TRY("flags-of-its-own", m.msg_flags = -1);
			TRY("name-of-length-129", m.msg_namelen = 129), TRY("name-of-length--1", m.msg_namelen = -1);
			TRY("name-null-of-length-16", (m.msg_name = NULL, m.msg_namelen = 16));
			say(name, "sendmsg", "null", connected, sendmsg(fd, NULL, MSG_NOSIGNAL));
			say(name, "sendmsg", "nobody's-page", connected, sendmsg(fd, (void *)0x1000000000, MSG_NOSIGNAL));
			say(name, "sendmsg", "over-the-edge", connected, sendmsg(fd, (void *)(page + 4096 - 8), MSG_NOSIGNAL));
			for (int bad = 0; bad < 3; bad++) {
				int sent;
				for (int i = 0; i < 3; i++) vector[i] = (struct mmsghdr){ good, 4711 };
				vector[bad].msg_hdr.msg_iov = &wild;
				sent = sendmmsg(fd, vector, 3, MSG_NOSIGNAL);
				say(name, "sendmmsg", "bad-at", bad, sent);
				for (int i = 0; i < 3; i++) printf("  %d %u\n", sent, vector[i].msg_len);
				vector[bad] = (struct mmsghdr){ good, 4711 }, vector[bad].msg_hdr.msg_namelen = -1;
				say(name, "sendmmsg", "name-bad-at", bad, sent = sendmmsg(fd, vector, 3, MSG_NOSIGNAL)), printf("  %d\n", sent);
			}
			say(name, "sendmmsg", "none", connected, sendmmsg(fd, vector, 0, MSG_NOSIGNAL));
			say(name, "sendmmsg", "none-of-null", connected, sendmmsg(fd, NULL, 0, MSG_NOSIGNAL));
			say(name, "sendmmsg", "null", connected, sendmmsg(fd, NULL, 1, MSG_NOSIGNAL));
			say(name, "sendmmsg", "that-cannot-be-written", connected, sendmmsg(fd, (void *)(page + 8192), 1, MSG_NOSIGNAL));
			say(name, "sendmmsg", "nobody's-page", connected, sendmmsg(fd, (void *)0x1000000000, 2, MSG_NOSIGNAL));
			say(name, "sendto", "wild-data", connected, sendto(fd, (void *)16, 4, MSG_NOSIGNAL, good.msg_name, good.msg_namelen));
			say(name, "sendto", "no-data", connected, sendto(fd, NULL, 0, MSG_NOSIGNAL, good.msg_name, good.msg_namelen));
			if (!stream) say(name, "sendto", "too-much", connected, sendto(fd, page - (1 << 17), 1 << 16, MSG_NOSIGNAL, good.msg_name, good.msg_namelen));
			say(name, "sendto", "out-of-band", connected, sendto(fd, "x", 1, MSG_NOSIGNAL | MSG_OOB, good.msg_name, good.msg_namelen));
			say(name, "sendto", "all-flags", connected, sendto(fd, "x", 1, ~(MSG_OOB | MSG_ZEROCOPY | MSG_FASTOPEN | MSG_MORE), good.msg_name, good.msg_namelen));
			if (fd != 77) close(fd);
		}
	}
}

/* Calls that give an address. */
static void given(void) {
	struct sockaddr_in name;
	static const long lengths[] = { 0, 1, 2, 8, 15, 16, 17, 128, 129, 0x7fffffff, 0x80000000, -1 };
	void *places[] = { NULL, (void *)16, (void *)0x1000000000, (void *)0xffff888000000000, (void *)-8, page + 4096, page + 8192 };
	address(GOOD, tcp_port), memcpy(&name, room, sizeof name);
	for (int how = 0; how < 3; how++) /* accept, accept4 with both flags, with a flag that is none */
		for (int i = 0; i < 12 + 7 + 7 + 1; i++) {
			struct sockaddr_in from;
			socklen_t length = 16, *at = &length;
			void *to = &from;
			int fd = socket(AF_INET, SOCK_STREAM, 0), got;
			if (i < 12) length = lengths[i];
			else if (i < 19) to = places[i - 12];
			else if (i < 26) at = places[i - 19];
			else to = NULL, at = NULL;
			connect(fd, (void *)&name, sizeof name);
			got = how == 0 ? accept(listener, to, at) : accept4(listener, to, at, how == 1 ? SOCK_NONBLOCK | SOCK_CLOEXEC : 64);
			say("listener", how == 0 ? "accept" : how == 1 ? "accept4" : "accept4-of-no-flag", "case", i, got);
			printf("  %u", (unsigned)length);
			if (got >= 0) {
				struct pollfd one = { fd, POLLIN };
				printf(" %d %d", fcntl(got, F_GETFL), fcntl(got, F_GETFD)), close(got);
				poll(&one, 1, 5000);
			}
			putchar('\n'), close(fd);
			/* What nobody took is not left for the next. */
			fcntl(listener, F_SETFL, O_NONBLOCK);
			while ((got = accept(listener, NULL, NULL)) >= 0) close(got);
			fcntl(listener, F_SETFL, 0);
		}
	for (int kind = 0; kind < KINDS; kind++) {
		const char *who = kinds[kind].name;
		int fd = make(kind, SOCK_NONBLOCK);
		say(who, "accept", "null", 0, accept(fd, NULL, NULL));
		say(who, "accept", "nobody's-page", 0, accept(fd, places[2], places[2]));
		say(who, "accept4", "of-no-flag", 0, accept4(fd, NULL, NULL, 64));
		for (int i = 0; i < 26; i++) {
			char room[ROOM];
			socklen_t length = 16, *at = &length;
			void *to = room;
			if (i < 12) length = lengths[i];
			else if (i < 19) to = places[i - 12];
			else at = places[i - 19];
			say(who, "getsockname", "case", i, getsockname(fd, to, at)), printf("  %u\n", (unsigned)length);
			say(who, "getpeername", "case", i, getpeername(fd, to, at));
		}
		say(who, "recvfrom", "nothing-there", 0, recvfrom(fd, room, 1, MSG_DONTWAIT, places[2], places[2]));
		say(who, "recvmsg", "null", 0, recvmsg(fd, NULL, MSG_DONTWAIT));
		say(who, "recvmsg", "nobody's-page", 0, recvmsg(fd, places[2], MSG_DONTWAIT));
		say(who, "recvmmsg", "null", 0, recvmmsg(fd, NULL, 1, MSG_DONTWAIT, NULL));
		say(who, "recvmmsg", "none", 0, recvmmsg(fd, NULL, 0, MSG_DONTWAIT, NULL));
		say(who, "recvmmsg", "wild-time", 0, recvmmsg(fd, NULL, 1, MSG_DONTWAIT, places[1]));
		if (fd >= 0 && fd != 77) close(fd);
	}
	/* Datagrams that are there. */
	for (int i = 0; i < 26; i++) {
		int fd = socket(AF_INET, SOCK_DGRAM, 0);
		socklen_t length = 16, *at = &length;
		char from[ROOM], data[8];
		void *to = from;
		struct iovec part = { data, 8 };
		struct msghdr message = { NULL, 0, &part, 1 };
		if (i < 12) length = lengths[i];
		else if (i < 19) to = places[i - 12];
		else at = places[i - 19];
		bind(fd, v4("127.0.0.1", 0, AF_INET), 16);
		getsockname(fd, (void *)&name, &(socklen_t){ 16 });
		sendto(fd, "word", 4, 0, (void *)&name, 16), sendto(fd, "word", 4, 0, (void *)&name, 16);
		say("udp", "recvfrom", "case", i, recvfrom(fd, data, 8, MSG_DONTWAIT, to, at)), printf("  %u\n", (unsigned)length);
		message.msg_name = to, message.msg_namelen = length;
		say("udp", "recvmsg", "case", i, recvmsg(fd, &message, MSG_DONTWAIT)), printf("  %u\n", message.msg_namelen);
		say("udp", "recv", "what-is-left", i, recv(fd, data, 8, MSG_DONTWAIT));
		close(fd);
	}
}

/* Calls with numbers only. */
static void numbers(void) {
	for (int kind = 0; kind < KINDS; kind++)
		for (int backlog = -1; backlog < 2; backlog++) {
			int fd = make(kind, 0);
			say(kinds[kind].name, "listen", "backlog", backlog, listen(fd, backlog));
			say(kinds[kind].name, "listen", "again", backlog, listen(fd, 1 << 30));
			if (kind < UNIX) say(kinds[kind].name, "connect", "of-a-listener", backlog, connect(fd, address(GOOD, tcp_port), 16));
			if (fd >= 0 && fd != 77) close(fd);
		}
	for (int domain = -1; domain < 50; domain++) {
		if (domain != AF_INET && domain != AF_INET6 && domain != 99 && domain != -1 && domain != AF_UNIX && domain != 49 && domain != 12) continue;
		for (int type = -1; type < 12; type++)
			for (int protocol = -1; protocol < 4; protocol++) {
				int fd = socket(domain, type, protocol == 3 ? IPPROTO_UDP : protocol == 2 ? IPPROTO_TCP : protocol);
				printf("domain %d type %d ", domain, type), say("socket", "socket", "protocol", protocol, fd), fd < 0 || close(fd);
			}
	}
}

int main(int n, char **words) {
	struct sockaddr_in6 name;
	int receiver = socket(AF_INET6, SOCK_DGRAM, 0);
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	page = (char *)mmap(NULL, (1 << 17) + 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + (1 << 17);
	mprotect(page + 4096, 4096, PROT_NONE), mprotect(page + 8192, 4096, PROT_READ);
	listener = socket(AF_INET6, SOCK_STREAM, 0);
	bind(listener, v6("::", 0, 0), 28), listen(listener, 4096), bind(receiver, v6("::", 0, 0), 28);
	getsockname(listener, (void *)&name, &(socklen_t){ 28 }), tcp_port = ntohs(name.sin6_port);
	getsockname(receiver, (void *)&name, &(socklen_t){ 28 }), udp_port = ntohs(name.sin6_port);
	if (n < 2 || strchr(words[1], 'a')) addressed();
	if (n < 2 || strchr(words[1], 'm')) messages();
	/* What is in the queue would be accepted first. */
	close(listener), listener = socket(AF_INET, SOCK_STREAM, 0);
	bind(listener, v4("127.0.0.1", 0, AF_INET), 16), listen(listener, 16);
	getsockname(listener, (void *)&name, &(socklen_t){ 28 }), tcp_port = ntohs(name.sin6_port);
	if (n < 2 || strchr(words[1], 'g')) given();
	if (n < 2 || strchr(words[1], 'n')) numbers();
	return 0;
}

/* Threads with the smallest stack there may be, each making every call. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
static void *all(void *_) {
	char c = 0;
	struct sockaddr_in at = { AF_INET, 0, { htonl(INADDR_LOOPBACK) } };
	struct iovec part = { &c, 1 };
	struct msghdr m = { &at, sizeof at, &part, 1 };
	struct mmsghdr mm = { m };
	socklen_t n = sizeof at;
	int l = socket(AF_INET, SOCK_STREAM, 0), s = socket(AF_INET, SOCK_STREAM, 0), u = socket(AF_INET, SOCK_DGRAM, 0), a;
	if (bind(l, (void *)&at, n) || listen(l, 5) || getsockname(l, (void *)&at, &n)) return "bind";
	if (connect(s, (void *)&at, n)) return "connect";
	if ((a = accept(l, (void *)&at, &n)) < 0) return "accept";
	if (getpeername(s, (void *)&at, &n)) return "getpeername";
	at.sin_port = 0;
	if (bind(u, (void *)&at, n) || getsockname(u, (void *)&at, &n)) return "bind datagrams";
	if (sendto(u, "x", 1, 0, (void *)&at, n) != 1 || recvfrom(u, &c, 1, 0, (void *)&at, &n) != 1) return "sendto";
	if (sendmsg(u, &m, 0) != 1 || recv(u, &c, 1, 0) != 1) return "sendmsg";
	mm.msg_hdr = m;
	if (sendmmsg(u, &mm, 1, 0) != 1 || recvmmsg(u, &mm, 1, 0, NULL) != 1) return "sendmmsg";
	close(l), close(s), close(u), close(a);
	return "";
}
int main(void) {
	pthread_attr_t small;
	pthread_attr_init(&small);
	if (pthread_attr_setstacksize(&small, sysconf(_SC_THREAD_STACK_MIN))) return perror("stack"), 1;
	for (int round = 0; round < 3; round++) {
		pthread_t t[8];
		void *how;
		for (int i = 0; i < 8; i++) pthread_create(&t[i], &small, all, NULL);
		for (int i = 0; i < 8; i++) pthread_join(t[i], &how), printf("%s.", (char *)how);
		fflush(stdout);
		if (round == 1 && fork() == 0) { pthread_create(t, &small, all, NULL), pthread_join(*t, &how); return *(char *)how != 0; }
	}
	int how; wait(&how), printf(" %d\n", how);
}

/* Dials, may leave its memory to another process, and become another image, which dials from the same place. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>
static volatile int kept;
static char stack[65536];
static struct sockaddr_in *at;
static int keep(void *_) {
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	kept = 1;
	for (;;) pause();
}
static void dial(const char *far, int port) {
	struct sockaddr_in there = { 0 };
	socklen_t n = sizeof there;
	int s = socket(AF_INET, SOCK_STREAM, 0);
	*at = (struct sockaddr_in){ AF_INET, htons(port), { inet_addr(far) } };
	if (connect(s, (void *)at, sizeof *at)) printf("%d:%s ", port, strerrorname_np(errno));
	else getpeername(s, (void *)&there, &n), printf("%d:at %d ", port, ntohs(there.sin_port));
	close(s);
}
int main(int count, char **args) {
	at = mmap((void *)0x30000000, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	for (int i = 0; i < 2; i++) dial(args[1], 80), dial(args[1], 81);
	puts(""), fflush(stdout);
	if (count == 2) return 0;
	dial(args[1], 80);
	if (count == 4 && clone(keep, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL) < 0) return perror("clone"), 1;
	while (count == 4 && !kept) sched_yield();
	return execl(args[2], args[2], args[1], NULL);
}

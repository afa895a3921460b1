/* The client of the guard's bench: as often as a line of its standard input says, connects and closes, or sends a
 * byte with sendmsg(2) and waits for its echo; then says the median in nanoseconds and the rate. */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static int order(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static int dial(const struct sockaddr_in *to, double *took)
{
	struct linger none = { 1, 0 }; /* leaves no TIME_WAIT behind, which would use up the ports */
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
	double began = now();
	if (connect(fd, (const void *)to, sizeof *to)) {
		perror("connect");
		exit(1);
	}
	*took = now() - began;
	return fd;
}

int main(int count, char **words)
{
	struct sockaddr_in to = { AF_INET, htons(atoi(words[2])), { inet_addr(words[1]) } };
	int flow = -1, on = 1, rounds;
	double took;
	if (!strcmp(words[3], "data")) {
		flow = dial(&to, &took);
		setsockopt(flow, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	}
	while (scanf("%d", &rounds) == 1) {
		double *times = calloc(rounds, sizeof *times), began = now();
		for (int i = 0; i < rounds; i++) {
			char byte = 'x';
			if (flow < 0) {
				close(dial(&to, times + i));
				continue;
			}
			struct iovec part = { &byte, 1 };
			struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
			double sent = now();
			if (sendmsg(flow, &message, 0) != 1 || read(flow, &byte, 1) != 1)
				return 1;
			times[i] = now() - sent;
		}
		double rate = rounds / ((now() - began) / 1e9);
		qsort(times, rounds, sizeof *times, order);
		printf("%f %f\n", times[rounds / 2], rate);
		fflush(stdout);
		free(times);
	}
	return 0;
}

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The backstop: programs on a cgroup that let through only what the broker granted.
 *
 * Each hook is two programs. The one attached to the cgroup calls the one that judges through a program
 * array, which only the broker holds open: when the broker ends, however it ends, the kernel empties
 * that array (prog_array_map_clear), the call falls through, and the answer is a refusal. So nothing
 * polls, and nothing new is granted by the dead.
 *
 * Layouts here are those of src/layout.rs; a test there compares sizes. */
#include "kernel.h"

/* Numbers of portcullis_types::Op. */
enum { CONNECT = 1, BIND = 2, LISTEN = 3, SEND = 5, SOCKET = 7 };

/* Why a record is written; src/layout.rs names them. */
enum cause {
	GRANTED,        /* permitted, on record */
	UNKNOWN,        /* nothing was ever granted to this image of this process with these credentials */
	NOT_GRANTED,    /* no grant covers it */
	STALE,          /* a grant of another generation, or one that has run out */
	NO_LEASE,       /* the broker did not renew its lease */
	NOT_A_LISTENER, /* a SYN to a listener that nobody granted */
	ROUTED,         /* a source route leads to another host than the one that is judged */
	/* These cannot be on record: */
	NO_BROKER,      /* the program array is empty */
	RING_FULL,      /* refused because it could not be put on record */
	CAUSES,
};

struct who {
	u32 tgid, uid;
	u64 start, exec, netns;
};

struct control {
	u64 generation;
	u64 lease;   /* CLOCK_MONOTONIC nanoseconds */
	u32 audit;   /* 1: what is not granted goes on, and is on record */
	u32 wanted;  /* thread that `identify` looks for */
};

/* What is granted to one process lies under one number, so that forgetting the process is one step. */
struct place {
	u32 bits; /* of what follows: 64 + prefix length */
	u32 process;
	u8 op, protocol;
	u16 zero;
	u8 addr[16];
};

#define RANGES 8
struct range {
	u16 low, high; /* host byte order, inclusive */
	u32 rule;
};
struct grant {
	u64 generation, until;
	u32 count;
	u32 silent; /* bit n: calls in range n are not put on record, as the broker has done so */
	struct range ranges[RANGES];
};

struct single {
	u64 cookie; /* of the socket; 0: any of the process */
	u32 process;
	u8 op, protocol;
	u16 port;
	u8 addr[16];
};
struct uses {
	u64 generation, until;
	s32 left;
	u32 rule;
};

/* A socket and whom it sends datagrams to: judged and on record once, as a connect is. */
struct flow {
	u64 cookie;
	u8 addr[16];
	u16 port, zero[3];
};

struct event {
	u64 time, start, exec, netns, cookie, generation;
	u32 tgid, tid, uid, process, rule, suppressed;
	u8 op, protocol, cause, permitted;
	u16 port, family;
	u8 addr[16];
	u32 zero[4];
};

#define RING (4 << 20)

#define MAP(name, kind, entries, key_t, value_t, flag) \
	struct { \
		UINT(type, kind); \
		UINT(max_entries, entries); \
		UINT(map_flags, flag); \
		TYPE(key, key_t); \
		TYPE(value, value_t); \
	} name SEC(".maps")

MAP(control, MAP_ARRAY, 1, u32, struct control, 0);
MAP(asleep, MAP_ARRAY, 1, u32, u32, 0);
MAP(stats, MAP_PERCPU_ARRAY, CAUSES, u32, u64, 0);
/* The kernel sets up a bucket for each of these entries when the map is made: a part of every cold start. */
MAP(processes, MAP_HASH, 32768, struct who, u32, NO_PREALLOC);
MAP(grants, MAP_LPM_TRIE, 262144, struct place, struct grant, NO_PREALLOC);
MAP(singles, MAP_HASH, 65536, struct single, struct uses, NO_PREALLOC);
MAP(listeners, MAP_HASH, 16384, u64, u32, NO_PREALLOC);
MAP(flows, MAP_LRU_HASH, 16384, struct flow, u64, 0); /* generation */
MAP(strangers, MAP_LRU_HASH, 1024, u64, u64, 0);
struct {
	UINT(type, MAP_RINGBUF);
	UINT(max_entries, RING);
} events SEC(".maps");

#define GATE(hook) MAP(gate_##hook, MAP_PROG_ARRAY, 1, u32, u32, 0)
GATE(connect4);
GATE(connect6);
GATE(bind4);
GATE(bind6);
GATE(sendmsg4);
GATE(sendmsg6);
GATE(sock_create);
GATE(ingress);
GATE(egress);

static const u32 zero = 0;

INLINE void count(u32 cause)
{
	u64 *n = look_up(&stats, &cause);
	if (n)
		*n += 1;
}

/* Which image of which process asks. Exec and reuse of the pid make another. */
INLINE void identify_current(struct who *who, void *ctx)
{
	struct task_struct *task = current_task(), *leader = 0;
	const struct cred *cred = 0;
	who->tgid = pid_tgid() >> 32;
	who->netns = netns_cookie(ctx);
	READ(leader, task->group_leader);
	READ(who->start, leader->start_boottime);
	READ(who->exec, task->self_exec_id);
	READ(cred, task->cred);
	READ(who->uid, cred->euid.val);
}

/* Puts one judged call on record. Returns whether it goes on: what cannot be put on record does not happen.
 *
 * The flag is looked at after the record has its place: the reader sets it and then looks for such
 * places, so one of the two sees the other. Refusals leave the last quarter to what is permitted: a
 * program that is refused a million times must not keep others from being served. */
INLINE int record(const struct event *from)
{
	if (!from->permitted && ring_query(&events, 0) > RING / 4 * 3) {
		count(RING_FULL);
		return 0;
	}
	struct event *to = ring_reserve(&events, sizeof(*to), 0);
	if (!to) {
		count(RING_FULL);
		return 0;
	}
	__builtin_memcpy(to, from, sizeof(*to));
	u64 flags = QUIETLY;
	u32 *sleeps = look_up(&asleep, &zero);
	if (sleeps)
		flags += __sync_val_compare_and_swap(sleeps, 1, 0) & (WAKE - QUIETLY);
	/* Read back, so that the verifier does not follow each value of them through all of this. */
	int goes_on = *(volatile u8 *)&to->permitted & 1;
	count(*(volatile u8 *)&to->cause);
	ring_submit(to, flags);
	return goes_on;
}

/* The region that covers the call and still holds, or 0 and the cause. */
INLINE int covered(const struct place *place, const struct control *now, struct event *event, int *silent)
{
	struct grant *grant = look_up(&grants, place);
	if (!grant)
		return 0;
	if (grant->generation != now->generation || event->time >= grant->until) {
		event->cause = STALE;
		return 0;
	}
	for (u32 i = 0; i < RANGES; i++) {
		if (i >= grant->count)
			break;
		if (event->port >= grant->ranges[i].low && event->port <= grant->ranges[i].high) {
			event->rule = grant->ranges[i].rule;
			*silent = grant->silent >> i & 1;
			return 1;
		}
	}
	return 0;
}

/* A grant for one destination, good for a number of calls. */
INLINE int singly(struct single *single, const struct control *now, struct event *event)
{
	struct uses *uses = look_up(&singles, single);
	if (!uses)
		return 0;
	if (uses->generation != now->generation || event->time >= uses->until) {
		event->cause = STALE;
		return 0;
	}
	if (__sync_fetch_and_add(&uses->left, -1) <= 0) {
		__sync_fetch_and_add(&uses->left, 1);
		return 0;
	}
	event->rule = uses->rule;
	return 1;
}

/* The judgement, in one place for all hooks. `event` holds op, protocol, family, port and addr. */
INLINE int judge(void *ctx, struct event *event)
{
	struct control *now = look_up(&control, &zero);
	struct who who = {};
	int permitted = 0, silent = 0;
	if (!now)
		return 0;
	identify_current(&who, ctx);
	event->time = ktime();
	event->start = who.start;
	event->exec = who.exec;
	event->netns = who.netns;
	event->tgid = who.tgid;
	event->tid = (u32)pid_tgid();
	event->uid = who.uid;
	event->rule = ~0u;
	event->generation = now->generation;
	event->cookie = socket_cookie(ctx);
	if (event->cause == ROUTED)
		goto out;
	event->cause = UNKNOWN;
	if (event->time >= now->lease) {
		event->cause = NO_LEASE;
		goto out;
	}
	u32 *process = look_up(&processes, &who);
	if (process) {
		event->cause = NOT_GRANTED;
		event->process = *process;
		struct place place = {
			.bits = 64 + 128, .process = *process, .op = event->op, .protocol = event->protocol,
		};
		__builtin_memcpy(place.addr, event->addr, 16);
		permitted = covered(&place, now, event, &silent);
		if (!permitted) {
			struct single single = {
				.cookie = event->cookie, .process = *process,
				.op = event->op, .protocol = event->protocol, .port = event->port,
			};
			__builtin_memcpy(single.addr, event->addr, 16);
			permitted = silent = singly(&single, now, event);
			if (!permitted) {
				single.cookie = 0;
				permitted = silent = singly(&single, now, event);
			}
		}
	}
	if (permitted)
		event->cause = GRANTED;
out:
	if (silent) {
		count(GRANTED);
		return 1;
	}
	event->permitted = permitted | (now->audit & 1);
	return record(event);
}

INLINE void v4(struct event *event, u32 ip)
{
	event->family = FAMILY_V4;
	event->addr[10] = event->addr[11] = 0xff;
	__builtin_memcpy(event->addr + 12, &ip, 4);
}

INLINE int judge_addr4(struct bpf_sock_addr *ctx, u8 op, u8 cause)
{
	struct event event = { .op = op, .protocol = ctx->protocol, .port = NTOHS(ctx->user_port), .cause = cause };
	v4(&event, ctx->user_ip4);
	return judge(ctx, &event);
}

INLINE int judge_addr6(struct bpf_sock_addr *ctx, u8 op, u8 cause)
{
	struct event event = { .op = op, .protocol = ctx->protocol, .port = NTOHS(ctx->user_port), .cause = cause };
	u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	event.family = FAMILY_V6;
	__builtin_memcpy(event.addr, ip, 16);
	return judge(ctx, &event);
}

/* An address of another family than the hook's is refused by the kernel itself, later and with its own
 * errno (EAFNOSUPPORT); the hooks of connect and bind come before that. bind takes AF_UNSPEC for AF_INET. */
#define TAKEN4(family, op) (family == FAMILY_V4 || (op == BIND && family == 0))
#define TAKEN6(family, op) (family == FAMILY_V6)

/* The attached program, and the one it calls while the broker lives. */
#define ADDRESS_HOOK(section, name, op, version) \
	SEC(section) int judge_##name(struct bpf_sock_addr *ctx) { return judge_addr##version(ctx, op, 0); } \
	SEC(section) int name(struct bpf_sock_addr *ctx) \
	{ \
		if (!TAKEN##version(ctx->user_family, op)) \
			return 1; \
		tail_call(ctx, &gate_##name, 0); \
		count(NO_BROKER); \
		return 0; \
	}
ADDRESS_HOOK("cgroup/connect4", connect4, CONNECT, 4)
ADDRESS_HOOK("cgroup/connect6", connect6, CONNECT, 6)
ADDRESS_HOOK("cgroup/bind4", bind4, BIND, 4)
ADDRESS_HOOK("cgroup/bind6", bind6, BIND, 6)

/* Datagrams after the first to one peer are an established flow: as long as the generation stays, they
 * cost one look-up, and go on when the broker has ended. */
#define DATAGRAM_HOOK(section, name, version) \
	SEC(section) int judge_##name(struct bpf_sock_addr *ctx) \
	{ \
		struct control *now = look_up(&control, &zero); \
		u8 cause = is_routed##version(ctx) ? ROUTED : 0; \
		int permitted = judge_addr##version(ctx, SEND, cause); \
		if (permitted && now && !cause) { \
			struct flow flow = flow##version(ctx); \
			u64 generation = now->generation; \
			update(&flows, &flow, &generation, 0); \
		} \
		return permitted; \
	} \
	SEC(section) int name(struct bpf_sock_addr *ctx) \
	{ \
		int routed = is_routed##version(ctx); \
		if (!routed && is_connected##version(ctx)) \
			return 1; \
		struct flow flow = flow##version(ctx); \
		struct control *now = look_up(&control, &zero); \
		u64 *generation = look_up(&flows, &flow); \
		if (!routed && generation && now && *generation == now->generation) \
			return 1; \
		tail_call(ctx, &gate_##name, 0); \
		count(NO_BROKER); \
		return 0; \
	}
/* Whether the datagram has IP options that lead it by way of another host, from a control message (IP_RETOPTS) or the
 * socket's own: packets go to that host first, with all that is in them. What the kernel will send by is where it keeps
 * the source address that the hook may change (udp_sendmsg, ipcm_cookie). A connected socket's datagram comes here
 * too if it has such a message. */
INLINE int is_routed4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock_addr_kern *kern = (void *)ctx;
	char *addr = 0;
	struct ip_options_rcu *options = 0;
	u8 route = 0;
	READ(addr, kern->t_ctx);
	struct ipcm_cookie *cookie = (void *)(addr - OFFSET(struct ipcm_cookie, addr));
	READ(options, cookie->opt);
	if (options)
		READ(route, options->opt.srr);
	return route;
}
INLINE int is_routed6(struct bpf_sock_addr *ctx)
{
	return 0;
}
/* Where a socket is connected to was judged, and what goes there comes to no hook, with two exceptions: if it has a
 * control message, with no address; and what an IPv6 socket sends to a v4-mapped address, in terms of sendto
 * (udpv6_sendmsg). No address has port 0: the kernel refuses it before. */
INLINE int is_connected4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	if (!ctx->user_port)
		return 1;
	return sk && sk->family == FAMILY_V6 && sk->state == ESTABLISHED && sk->dst_ip4 == ctx->user_ip4 &&
	       sk->dst_port == (u16)ctx->user_port;
}
INLINE int is_connected6(struct bpf_sock_addr *ctx)
{
	return !ctx->user_port;
}
INLINE struct flow flow4(struct bpf_sock_addr *ctx)
{
	struct flow flow = { .cookie = socket_cookie(ctx), .port = ctx->user_port };
	u32 ip = ctx->user_ip4;
	flow.addr[10] = flow.addr[11] = 0xff;
	__builtin_memcpy(flow.addr + 12, &ip, 4);
	return flow;
}
INLINE struct flow flow6(struct bpf_sock_addr *ctx)
{
	struct flow flow = { .cookie = socket_cookie(ctx), .port = ctx->user_port };
	u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	__builtin_memcpy(flow.addr, ip, 16);
	return flow;
}
DATAGRAM_HOOK("cgroup/sendmsg4", sendmsg4, 4)
DATAGRAM_HOOK("cgroup/sendmsg6", sendmsg6, 6)

/* Streams and datagrams meet the hooks above before they carry anything; raw sockets, ping sockets,
 * SCTP and the rest do not, so making one is judged. */
SEC("cgroup/sock_create") int judge_sock_create(struct bpf_sock *ctx)
{
	struct event event = { .op = SOCKET, .family = ctx->family, .protocol = ctx->protocol };
	if (ctx->type == RAW)
		event.protocol = 255; /* portcullis_types::Protocol::RAW */
	return judge(ctx, &event);
}

SEC("cgroup/sock_create") int sock_create(struct bpf_sock *ctx)
{
	if (ctx->type == STREAM && (ctx->protocol == TCP || ctx->protocol == MPTCP))
		return 1;
	if (ctx->type == DATAGRAM && ctx->protocol == UDP)
		return 1;
	tail_call(ctx, &gate_sock_create, 0);
	count(NO_BROKER);
	return 0;
}

/* No hook of a cgroup sees listen(2). What makes a listener is that it is reached, so a segment for
 * one that nobody granted is dropped. Everything else that arrives passes untouched. */
SEC("cgroup_skb/ingress") int judge_ingress(struct __sk_buff *skb)
{
	u64 cookie = socket_cookie(skb), time = ktime();
	if (look_up(&listeners, &cookie))
		return 1;
	struct control *now = look_up(&control, &zero);
	if (!now)
		return 0;
	u32 audit = now->audit & 1;
	u64 *last = look_up(&strangers, &cookie);
	/* One record per listener and second; the next tells how many there were. */
	if (last && time - (*last & ~0xfffffull) < 1000000000) {
		if ((*last & 0xfffff) != 0xfffff)
			__sync_fetch_and_add(last, 1);
		return audit;
	}
	struct event event = {
		.op = LISTEN, .protocol = TCP, .cause = NOT_A_LISTENER, .time = time, .cookie = cookie,
		.rule = ~0u, .permitted = audit, .generation = now->generation,
	};
	if (last)
		event.suppressed = *last & 0xfffff;
	time &= ~0xfffffull;
	update(&strangers, &cookie, &time, 0);
	/* From the packet: the addresses in the context are the listener's. Data begins at the IP header. */
	if (skb->protocol == NTOHS(0x0800)) {
		u32 ip = 0;
		load_bytes(skb, 12, &ip, 4);
		v4(&event, ip);
	} else {
		event.family = FAMILY_V6;
		load_bytes(skb, 8, event.addr, 16);
	}
	event.port = skb->local_port;
	record(&event);
	return audit;
}

SEC("cgroup_skb/ingress") int ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	if (!sk)
		return 1;
	sk = full_socket(sk);
	if (!sk || sk->state != LISTENING)
		return 1;
	tail_call(skb, &gate_ingress, 0);
	count(NO_BROKER);
	return 0;
}

/* IPv6 has one kind of source route that a control message may ask for, type 2 (RFC 6275, 6.4), where the kernel knows
 * mobility. No other hook sees it, so packets are looked at as they leave; who sent them is not known here. */
SEC("cgroup_skb/egress") int judge_egress(struct __sk_buff *skb)
{
	struct control *now = look_up(&control, &zero);
	if (!now)
		return 0;
	u32 audit = now->audit & 1;
	struct event event = {
		.op = SEND, .cause = ROUTED, .time = ktime(), .cookie = socket_cookie(skb), .family = FAMILY_V6,
		.rule = ~0u, .permitted = audit, .generation = now->generation, .protocol = UDP,
	};
	load_bytes(skb, 24, event.addr, 16); /* whom it would go to */
	return record(&event);
}

/* Extension headers that may stand before or instead of the routing header (RFC 8200, 4.1). */
enum { HOP_BY_HOP = 0, ROUTING = 43, DESTINATION = 60 };
#define EXTENSIONS 4

SEC("cgroup_skb/egress") int egress(struct __sk_buff *skb)
{
	u8 next = 0;
	u32 at = 40;
	if (skb->protocol != NTOHS(0x86dd))
		return 1;
	load_bytes(skb, 6, &next, 1);
	for (int i = 0; i < EXTENSIONS; i++) {
		u8 header[4] = {}; /* what comes next, length, and of a routing header its type */
		if (next != HOP_BY_HOP && next != ROUTING && next != DESTINATION)
			return 1;
		if (load_bytes(skb, at, header, 4))
			return 1;
		if (next == ROUTING && header[2] == 2)
			break;
		next = header[0];
		at += 8 * (header[1] + 1);
	}
	tail_call(skb, &gate_egress, 0);
	count(NO_BROKER);
	return 0;
}

/* More filters than a task has in practice; that there are others below these is told by one more. */
#define FILTERS 32
/* Before its own instructions stand three of the kernel's (bpf_convert_filter). */
#define BEGINS (SIZE(struct bpf_prog) + 3 * 8)

struct filter {
	u64 at;      /* stands for it as long as a task has it */
	u64 logs;
	u64 code[8]; /* what it begins with */
};

/* Tells who a thread is, in the terms of `who`, to whoever reads the iterator; and its seccomp filters, the newest
 * first. What they mean is the reader's to say: each branch in the loop the verifier would follow so many times. */
SEC("iter/task") int identify(struct bpf_iter__task *ctx)
{
	/* Followed once: each step to a kernel structure has the verifier search all of the kernel's types by name. */
	void *out = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct control *now = look_up(&control, &zero);
	s32 pid = 0;
	if (!task || !now)
		return 0;
	READ(pid, task->pid);
	if (pid != (s32)now->wanted)
		return 0;
	struct who who = {};
	const struct cred *cred = 0;
	struct nsproxy *spaces = 0;
	struct net *net = 0;
	struct task_struct *leader = 0;
	READ(who.tgid, task->tgid);
	READ(leader, task->group_leader);
	READ(who.start, leader->start_boottime);
	READ(who.exec, task->self_exec_id);
	READ(cred, task->cred);
	READ(who.uid, cred->euid.val);
	READ(spaces, task->nsproxy);
	READ(net, spaces->net_ns);
	READ(who.netns, net->net_cookie);
	seq_write(out, &who, sizeof(who));
	struct seccomp_filter *filter = 0;
	READ(filter, task->seccomp.filter);
	for (int i = 0; i < FILTERS + 1 && filter; i++) {
		struct filter told = { .at = (u64)filter };
		struct bpf_prog *program = 0;
		READ(*(u8 *)&told.logs, filter->log);
		READ(program, filter->prog);
		read_kernel(told.code, sizeof(told.code), (char *)program + BEGINS);
		seq_write(out, &told, sizeof(told));
		READ(filter, filter->prev);
	}
	return 0;
}

char terms[] SEC("license") = "Dual MIT/GPL";

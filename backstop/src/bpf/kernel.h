/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The little of the kernel's interface that the programs use, so that building them needs clang alone:
 * no kernel or libbpf headers. Numbers and layouts are linux/bpf.h's; fields of kernel structures are
 * found at load time through the running kernel's own type information (BTF). */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;
typedef long long s64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define KERNEL __attribute__((preserve_access_index))

/* Map definitions by BTF, as libbpf and aya read them. */
#define UINT(name, value) int (*name)[value]
#define TYPE(name, type) type *name

enum { /* enum bpf_map_type */
	MAP_HASH = 1,
	MAP_ARRAY = 2,
	MAP_PROG_ARRAY = 3,
	MAP_PERCPU_ARRAY = 6,
	MAP_LRU_HASH = 9,
	MAP_LPM_TRIE = 11,
	MAP_RINGBUF = 27,
};
#define NO_PREALLOC 1 /* BPF_F_NO_PREALLOC */

enum { /* BPF_RB_*: whether a record wakes the reader */
	QUIETLY = 1,
	WAKE = 2,
};

/* enum bpf_func_id */
static void *(*look_up)(void *map, const void *key) = (void *)1;
static long (*update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static u64 (*ktime)(void) = (void *)5;
static long (*tail_call)(void *ctx, void *prog_array, u32 index) = (void *)12;
static u64 (*pid_tgid)(void) = (void *)14;
static long (*load_bytes)(void *skb, u32 offset, void *to, u32 len) = (void *)26;
static void *(*current_task)(void) = (void *)35;
static u64 (*socket_cookie)(void *ctx) = (void *)46;
static void *(*full_socket)(void *sock) = (void *)95;
static long (*read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static u64 (*netns_cookie)(void *ctx) = (void *)122;
static long (*seq_write)(void *seq, const void *data, u32 size) = (void *)127;
static void *(*ring_reserve)(void *ring, u64 size, u64 flags) = (void *)131;
static void (*ring_submit)(void *record, u64 flags) = (void *)132;
static u64 (*ring_query)(void *ring, u64 what) = (void *)134; /* 0: bytes that wait to be read */

/* Reads one field of a kernel structure wherever this kernel keeps it. */
#define READ(to, from) read_kernel(&(to), sizeof(to), __builtin_preserve_access_index(&(from)))
/* Where this kernel keeps a field. */
#define OFFSET(type, field) __builtin_preserve_field_info(((type *)0)->field, 0 /* BPF_FIELD_BYTE_OFFSET */)
/* How long this kernel's structure is. */
#define SIZE(type) __builtin_preserve_type_info(*(type *)0, 1 /* BPF_TYPE_SIZE */)

struct net {
	u64 net_cookie;
} KERNEL;

struct nsproxy {
	struct net *net_ns;
} KERNEL;

struct kuid {
	u32 val;
};

struct cred {
	struct kuid euid;
} KERNEL;

struct bpf_prog {
	u16 pages;
	/* its instructions follow */
} KERNEL;

struct seccomp_filter {
	u8 log; /* SECCOMP_FILTER_FLAG_LOG */
	struct seccomp_filter *prev;
	struct bpf_prog *prog;
} KERNEL;

struct seccomp {
	struct seccomp_filter *filter; /* the newest; each leads to the one before */
} KERNEL;

struct task_struct {
	s32 pid, tgid;
	struct task_struct *group_leader;
	u64 start_boottime; /* CLOCK_BOOTTIME nanoseconds; proc_pid_stat(5) field 22 is this in ticks */
	u64 self_exec_id;   /* grows by one with every exec */
	const struct cred *cred;
	struct nsproxy *nsproxy;
	struct seccomp seccomp;
} KERNEL;

struct bpf_iter_meta {
	void *seq;
} KERNEL;

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
} KERNEL;

/* What the context of address hooks really is. */
struct bpf_sock_addr_kern {
	void *t_ctx; /* the source address of a datagram */
} KERNEL;

struct ip_options {
	u8 srr; /* where a source route begins; 0: there is none */
} KERNEL;

struct ip_options_rcu {
	struct ip_options opt;
} KERNEL;

struct ipcm_cookie {
	u32 addr;
	struct ip_options_rcu *opt;
} KERNEL;

/* linux/bpf.h: contexts, whose layout is fixed. Addresses and ports are in network byte order. */
struct bpf_sock {
	u32 bound_dev_if, family, type, protocol, mark, priority, src_ip4, src_ip6[4], src_port;
	u16 dst_port, : 16;
	u32 dst_ip4, dst_ip6[4], state;
	s32 rx_queue_mapping;
};

struct bpf_sock_addr {
	u32 user_family, user_ip4, user_ip6[4], user_port, family, type, protocol, msg_src_ip4, msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
};

struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto, priority;
	u32 ingress_ifindex, ifindex, tc_index, cb[5], hash, tc_classid, data, data_end, napi_id;
	u32 family, remote_ip4, local_ip4, remote_ip6[4], local_ip6[4], remote_port, local_port, data_meta;
	void *flow_keys __attribute__((aligned(8)));
	u64 tstamp;
	u32 wire_len, gso_segs;
	struct bpf_sock *sk __attribute__((aligned(8)));
};

enum {
	ESTABLISHED = 1, /* TCP_ESTABLISHED; datagram sockets that are connected too */
	LISTENING = 10,  /* TCP_LISTEN */
	STREAM = 1,
	DATAGRAM = 2,
	RAW = 3,
	FAMILY_V4 = 2,
	FAMILY_V6 = 10,
	TCP = 6,
	UDP = 17,
	MPTCP = 262,
};
#define NTOHS(port) __builtin_bswap16((u16)(port)) /* x86_64 and aarch64 are little-endian */

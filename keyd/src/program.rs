//! The filter itself: what the kernel runs for each packet that reaches a filtered socket. Pure.

use portcullis_wire::Family;

use crate::asm::{Assembly, If, JumpError, Label, R, Width};

/// Most reports in one second, over all filters.
pub const REPORTS_PER_SECOND: i32 = 200;
/// Repeats within this time are the same attempt (see `portcullis_wire::keyd::Stranger`).
const SAME_ATTEMPT: u64 = 70_000_000_000;
const SECOND: u64 = 1_000_000_000;

/// Descriptor numbers of the maps that a program refers to.
pub struct Maps {
    pub nets: i32,
    pub ring: i32,
    pub rate: i32,
    pub seen: i32,
}

/// Length of a report in the ring.
pub const EVENT_SIZE: usize = 64;

/// The filter. It sees an IP packet whose transport header is at offset 0 and returns how much of
/// it the socket gets: all or nothing. What has `mark`, if it is not 0, passes: it is the key daemon's own.
pub fn program(maps: &Maps, tag: u64, is_tcp: bool, mark: u32) -> Result<Vec<[u8; 8]>, JumpError> {
    use Width::{B, D, W};
    // Helpers (linux/bpf.h, bpf_func_id).
    const LOOK_UP: i32 = 1;
    const UPDATE: i32 = 2;
    const NOW: i32 = 5;
    const LOAD: i32 = 26;
    const LOAD_RELATIVE: i32 = 68;
    const RING_OUTPUT: i32 = 130;
    const FROM_IP_HEADER: i32 = 1; // BPF_HDR_START_NET
    const CTX_MARK: i16 = 8;
    const CTX_PROTOCOL: i16 = 16; // struct __sk_buff: EtherType in network byte order
    const IPV4: i32 = 0x0800_u16.to_be() as i32;
    const IPV6: i32 = 0x86dd_u16.to_be() as i32;
    // The stack, downward from r10: the look-up key; the event, whose part from FAMILY on is also the
    // key under which an attempt is remembered; a scratch word.
    const LOOK: i16 = -24; // prefix length 4, family 4, source 16
    const EVENT: i16 = LOOK - 64;
    const TAG: i16 = EVENT;
    const TIME: i16 = EVENT + 8;
    const FAMILY: i16 = EVENT + 16;
    const PROTOCOL: i16 = EVENT + 20;
    const SOURCE: i16 = EVENT + 24;
    const DESTINATION: i16 = EVENT + 40;
    const PORTS: i16 = EVENT + 56;
    const SCRATCH: i16 = EVENT - 8;
    const ALL_BITS: i32 = 32 + 128;
    let [r0, r1, r2, r3, r4, r5, r6, r7, r8, r9, fp] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map(R);

    let mut asm = Assembly::default();
    let [v6, look, dropped, pass, fresh, report, same_second, missed, out]: [Label; 9] =
        std::array::from_fn(|_| asm.label());

    asm.copy(r6, r1);
    if mark != 0 {
        asm.load(W, r1, r6, CTX_MARK);
        asm.set64(r2, mark.into());
        asm.sub(r1, r2);
        asm.jump_if(If::Equal, r1, 0, pass);
    }
    for word in 0..12 {
        asm.store_imm(D, fp, SCRATCH + 8 * word, 0);
    }
    asm.store_imm(W, fp, LOOK, ALL_BITS);
    let load = |asm: &mut Assembly, helper, offset, to, length| {
        asm.copy(r1, r6);
        asm.set(r2, offset);
        asm.copy(r3, fp);
        asm.add(r3, to);
        asm.set(r4, length);
        asm.set(r5, FROM_IP_HEADER);
        asm.call(helper);
        asm.jump_if(If::Unequal, r0, 0, out);
    };
    load(&mut asm, LOAD, 0, PORTS.into(), 4);
    asm.load(W, r7, r6, CTX_PROTOCOL);
    asm.jump_if(If::Equal, r7, IPV6, v6);
    asm.jump_if(If::Unequal, r7, IPV4, out);
    asm.store_imm(W, fp, LOOK + 4, Family::V4 as i32);
    load(&mut asm, LOAD_RELATIVE, 12, i32::from(LOOK) + 8, 4);
    load(&mut asm, LOAD_RELATIVE, 16, DESTINATION.into(), 4);
    asm.jump(look);
    asm.here(v6);
    asm.store_imm(W, fp, LOOK + 4, Family::V6 as i32);
    load(&mut asm, LOAD_RELATIVE, 8, i32::from(LOOK) + 8, 16);
    load(&mut asm, LOAD_RELATIVE, 24, DESTINATION.into(), 16);

    asm.here(look);
    let look_up = |asm: &mut Assembly, map, key: i16| {
        asm.map(r1, map);
        asm.copy(r2, fp);
        asm.add(r2, key.into());
        asm.call(LOOK_UP);
    };
    look_up(&mut asm, maps.nets, LOOK);
    asm.jump_if(If::Equal, r0, 0, dropped);
    asm.load(Width::H, r8, fp, PORTS);
    asm.host_order16(r8);
    for range in 0..4 {
        let next = asm.label();
        asm.load(W, r1, r0, 4 * range);
        asm.copy(r2, r1);
        asm.shift_right(r2, 16);
        asm.and(r1, 0xffff);
        asm.jump_if_above(r2, r8, next);
        asm.jump_if_above(r8, r1, next);
        asm.jump(pass);
        asm.here(next);
    }

    asm.here(dropped);
    if is_tcp {
        const SYN_ACK: i32 = 0x12;
        const SYN: i32 = 0x02;
        load(&mut asm, LOAD, 13, SCRATCH.into(), 1);
        asm.load(B, r1, fp, SCRATCH);
        asm.and(r1, SYN_ACK);
        asm.jump_if(If::Unequal, r1, SYN, out);
    }
    asm.set64(r1, tag);
    asm.store(D, fp, TAG, r1);
    asm.call(NOW);
    asm.copy(r9, r0);
    asm.store(D, fp, TIME, r9);
    asm.load(W, r1, fp, LOOK + 4);
    asm.store(W, fp, FAMILY, r1);
    asm.store_imm(W, fp, PROTOCOL, if is_tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP });
    for half in [0, 8] {
        asm.load(D, r1, fp, LOOK + 8 + half);
        asm.store(D, fp, SOURCE + half, r1);
    }
    look_up(&mut asm, maps.seen, FAMILY);
    asm.jump_if(If::Equal, r0, 0, fresh);
    asm.load(D, r1, r0, 0);
    asm.store(D, r0, 0, r9);
    asm.copy(r2, r9);
    asm.sub(r2, r1);
    asm.set64(r3, SAME_ATTEMPT);
    asm.jump_if_above(r3, r2, out);
    asm.jump(report);

    asm.here(fresh);
    asm.map(r1, maps.seen);
    asm.copy(r2, fp);
    asm.add(r2, FAMILY.into());
    asm.copy(r3, fp);
    asm.add(r3, TIME.into());
    asm.set(r4, 0);
    asm.call(UPDATE);

    asm.here(report);
    asm.store_imm(D, fp, SCRATCH, 0);
    look_up(&mut asm, maps.rate, SCRATCH);
    asm.jump_if(If::Equal, r0, 0, out);
    asm.copy(r7, r0);
    asm.load(D, r1, r7, 0);
    asm.copy(r2, r9);
    asm.sub(r2, r1);
    asm.set64(r3, SECOND);
    asm.jump_if_above(r3, r2, same_second);
    asm.store(D, r7, 0, r9);
    asm.store_imm(D, r7, 8, 0);
    asm.here(same_second);
    asm.set(r1, 1);
    asm.atomic_add(r7, 8, r1);
    asm.load(D, r1, r7, 8);
    asm.set(r2, REPORTS_PER_SECOND);
    asm.jump_if_above(r1, r2, missed);
    asm.map(r1, maps.ring);
    asm.copy(r2, fp);
    asm.add(r2, EVENT.into());
    asm.set(r3, (LOOK - EVENT).into());
    asm.set(r4, 0);
    asm.call(RING_OUTPUT);
    asm.jump_if(If::Equal, r0, 0, out);
    asm.here(missed);
    asm.set(r1, 1);
    asm.atomic_add(r7, 16, r1);
    asm.here(out);
    asm.set(r0, 0);
    asm.exit();
    asm.here(pass);
    asm.set(r0, -1);
    asm.exit();
    asm.finish()
}

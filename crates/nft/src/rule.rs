//! Rules, as the expressions that nftables makes of them (linux/netfilter/nf_tables.h).

use crate::netlink::Attributes;

const LIST_ELEMENT: u16 = 1;
/// Registers of four bytes: `NFT_REG32_00` and those after it.
pub const R0: u32 = 8;

/// Where in a packet something is.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    Network = 1,
    Transport = 2,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug)]
pub enum End<'a> {
    Accept,
    Drop,
    Jump(&'a str),
}

/// One rule: its expressions in their order.
#[derive(Debug, Default)]
pub struct Rule(Attributes);

impl Rule {
    /// As `NFTA_RULE_EXPRESSIONS` has it.
    pub fn write<'a>(&self, to: &'a mut Attributes) -> &'a mut Attributes {
        to.0.extend(&self.0.0);
        to
    }

    /// What another one does too.
    pub fn and(mut self, other: Self) -> Self {
        self.0.0.extend(other.0.0);
        self
    }

    fn with(mut self, name: &str, fill: impl FnOnce(&mut Attributes) -> &mut Attributes) -> Self {
        self.0.nested(LIST_ELEMENT, |it| it.text(1, name).nested(2, fill));
        self
    }

    /// `meta nfproto`, 15, or `meta l4proto`, 16.
    pub fn meta(self, key: u32, to: u32) -> Self {
        self.with("meta", |it| it.word(1, to).word(2, key))
    }

    /// A piece of the packet.
    pub fn piece(self, base: Base, offset: u32, length: u32, to: u32) -> Self {
        self.with("payload", |it| it.word(1, to).word(2, base as u32).word(3, offset).word(4, length))
    }

    /// A constant.
    pub fn constant(self, value: &[u8], to: u32) -> Self {
        self.with("immediate", |it| it.word(1, to).nested(2, |data| data.bytes(1, value)))
    }

    /// Keeps some bits of one byte.
    pub fn masked(self, register: u32, mask: u8) -> Self {
        self.with("bitwise", |it| {
            it.word(1, register).word(2, register).word(3, 1);
            it.nested(4, |data| data.bytes(1, &[mask]));
            it.nested(5, |data| data.bytes(1, &[0]))
        })
    }

    /// Goes on only if this is in the register, or (`same` is false) is not.
    pub fn compared(self, register: u32, value: &[u8], same: bool) -> Self {
        self.with("cmp", |it| {
            it.word(1, register).word(2, u32::from(!same)).nested(3, |data| data.bytes(1, value))
        })
    }

    /// Goes on only if the set has what is in the registers.
    pub fn in_set(self, set: &str, register: u32) -> Self {
        self.with("lookup", |it| it.text(1, set).word(2, register))
    }

    /// Puts what is in the registers into a set, or makes it young again there.
    pub fn remembered(self, set: &str, register: u32) -> Self {
        const UPDATE: u32 = 1;
        self.with("dynset", |it| it.text(1, set).word(3, UPDATE).word(4, register))
    }

    /// Goes on only for sockets made in this cgroup or below it. `level`: how deep it is in the hierarchy.
    pub fn of_cgroup(self, id: u64, level: u32) -> Self {
        const CGROUP_V2: u32 = 3;
        let socket = self.with("socket", |it| it.word(1, CGROUP_V2).word(2, R0).word(3, level));
        socket.compared(R0, &id.to_ne_bytes(), true)
    }

    /// Tells who listens at the group.
    pub fn logged(self, group: u16, prefix: &str) -> Self {
        self.with("log", |it| it.bytes(1, &group.to_be_bytes()).text(2, prefix))
    }

    /// Answers as if nobody were there: a reset (only to TCP), or port unreachable.
    pub fn rejected(self, by_reset: bool) -> Self {
        const RESET: u32 = 1;
        const ANY_ICMP: u32 = 2;
        const PORT_UNREACHABLE: u8 = 1;
        self.with("reject", |it| match by_reset {
            true => it.word(1, RESET).bytes(2, &[0]),
            false => it.word(1, ANY_ICMP).bytes(2, &[PORT_UNREACHABLE]),
        })
    }

    /// The end of the rule.
    pub fn then(self, end: End<'_>) -> Self {
        let (code, chain): (i32, _) = match end {
            End::Drop => (0, None),
            End::Accept => (1, None),
            End::Jump(chain) => (-3, Some(chain)),
        };
        self.with("immediate", |it| {
            it.word(1, 0).nested(2, |data| {
                data.nested(2, |verdict| {
                    verdict.word(1, code.cast_unsigned());
                    if let Some(chain) = chain {
                        verdict.text(2, chain);
                    }
                    verdict
                })
            })
        })
    }
}

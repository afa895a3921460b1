//! What passes between the parts of one host: fixed-layout frames over `SOCK_SEQPACKET`, and the
//! memory that a wrapped process shares with its broker.
//!
//! Two borders, each hostile from the privileged side's point of view:
//!
//! - **shim → broker** ([`frame`], [`shared`]): any program may write anything here. Frames have one
//!   size and are checked before use; shared memory is copied once and then checked.
//! - **broker → keyd** ([`keyd`]): the broker alone speaks, and only what the table permits.
//!
//! No allocation, lock, logger or runtime: the shim links this into other people's processes.

pub mod addr;
pub mod frame;
pub mod gate;
pub mod keyd;
pub mod shared;

pub use addr::{Addr, Family, is_token};
pub use frame::{Flags, FrameError, OpCode, Reply, Request};

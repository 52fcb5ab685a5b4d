//! Addresses that must not be mixed up.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address in bytes. `None` from 2^52 on: no CPU has more physical address bits.
            pub const fn new(address: u64) -> Option<Self> {
                if address >> 52 == 0 { Some(Self(address)) } else { None }
            }

            /// The address in bytes, cut off at 52 bits.
            pub const fn new_truncate(address: u64) -> Self {
                Self(address & ((1 << 52) - 1))
            }

            /// The address in bytes.
            pub const fn as_u64(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address!(
    /// A physical address as the guest uses it: an allegation until it is translated.
    GuestPhysAddr
);
address!(
    /// A physical address of the machine.
    HostPhysAddr
);

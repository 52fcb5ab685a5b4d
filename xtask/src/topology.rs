//! How a machine's CPUs are arranged.

use std::fmt::{self, Display};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

/// The most CPUs that the hypervisor uses: their masks have 64 bits.
pub const MAX_CPUS: u64 = 64;

/// Packages, cores and threads of a machine. A CPU is a thread.
///
/// Written `PACKAGES:CORES:THREADS`, or `N` for N packages of one core with one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Packages of the machine.
    pub packages: u32,
    /// Cores of a package.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// Number of CPUs.
    pub fn cpus(self) -> u64 {
        let factors = [self.packages, self.cores, self.threads];
        factors.into_iter().map(u64::from).fold(1, u64::saturating_mul)
    }

    /// Whether a machine can be like that.
    ///
    /// # Errors
    /// Without CPUs, or with more than [`MAX_CPUS`].
    pub fn check(self) -> Result<()> {
        let cpus = self.cpus();
        ensure!(cpus > 0, "a machine needs at least one CPU, not {self}");
        ensure!(cpus <= MAX_CPUS, "a machine has at most {MAX_CPUS} CPUs, not {cpus} ({self})");
        Ok(())
    }
}

impl From<u32> for Topology {
    /// So many packages of one core with one thread.
    fn from(packages: u32) -> Self {
        Self { packages, cores: 1, threads: 1 }
    }
}

impl FromStr for Topology {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |word: &str| {
            word.parse::<u32>().ok().with_context(|| format!("{word:?} is not a number of CPUs"))
        };
        let numbers = text.split(':').map(number).collect::<Result<Vec<_>>>()?;
        let topology = match numbers[..] {
            [cpus] => cpus.into(),
            [packages, cores, threads] => Self { packages, cores, threads },
            _ => bail!("{text:?} is neither N nor PACKAGES:CORES:THREADS"),
        };
        topology.check()?;
        Ok(topology)
    }
}

impl Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packages, cores, threads } = self;
        match (cores, threads) {
            (1, 1) => write!(f, "{packages}"),
            _ => write!(f, "{packages}:{cores}:{threads}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_written() {
        let four: Topology = "4".parse().unwrap();
        assert_eq!((four, four.cpus()), (4.into(), 4));
        let threads: Topology = "1:2:2".parse().unwrap();
        assert_eq!(threads, Topology { packages: 1, cores: 2, threads: 2 });
        assert_eq!(threads.cpus(), 4);
        for text in ["1", "64", "1:2:2", "2:8:4"] {
            assert_eq!(text.parse::<Topology>().unwrap().to_string(), text);
        }
        assert_eq!("3:1:1".parse::<Topology>().unwrap().to_string(), "3");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let why = |text: &str| text.parse::<Topology>().unwrap_err().to_string();
        assert!(why("four").contains("\"four\" is not a number"));
        assert!(why("1:2:").contains("\"\" is not a number"));
        assert!(why("-1").contains("\"-1\" is not a number"));
        assert!(why("2:2").contains("neither N nor PACKAGES:CORES:THREADS"));
        assert!(why("1:1:1:1").contains("neither"));
        assert!(why("0").contains("at least one CPU"));
        assert!(why("2:0:1").contains("at least one CPU"));
        assert!(why("65").contains("at most 64 CPUs, not 65"));
        assert!(why("2:9:4").contains("at most 64 CPUs, not 72 (2:9:4)"));
        assert!(why("4294967295:4294967295:4294967295").contains("at most 64"));
    }
}

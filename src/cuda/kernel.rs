//! The kernels by name, and which one a call takes.

use crate::options::NormType;

/// Names each kernel once: here, and as the symbol it has in `kernels/`.
macro_rules! kernels {
    ($($name:ident = $symbol:literal,)*) => {
        /// A kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kernel {
            $($name,)*
        }

        impl Kernel {
            /// All of them; the index is the number.
            #[cfg(test)]
            pub(crate) const ALL: [Self; Self::COUNT] = [$(Self::$name),*];
            pub(crate) const COUNT: usize = [$($symbol),*].len();

            pub(crate) fn symbol(self) -> &'static str {
                match self {
                    $(Self::$name => $symbol,)*
                }
            }
        }
    };
}

kernels! {
    NormPartialsL1 = "norm_partials_l1",
    NormPartialsL2 = "norm_partials_l2",
    NormPartialsInf = "norm_partials_inf",
    NormPartialsP = "norm_partials_p",
    ClipCoef = "clip_coef",
    ClipCoefP = "clip_coef_p",
    ClipCoefRms = "clip_coef_rms",
    ClipCoefOfNorm = "clip_coef_of_norm",
    Scale = "scale",
    ScaleAny = "scale_any",
    ScaleInto = "scale_into",
    Clamp = "clamp",
    ClampCounts = "clamp_counts",
    ScopedPartialsL1 = "scoped_partials_l1",
    ScopedPartialsL2 = "scoped_partials_l2",
    ScopedPartialsInf = "scoped_partials_inf",
    ScopedPartialsP = "scoped_partials_p",
    ScopedStatsL1 = "scoped_stats_l1",
    ScopedStatsL2 = "scoped_stats_l2",
    ScopedStatsInf = "scoped_stats_inf",
    ScopedStatsP = "scoped_stats_p",
    ScopedCoefs = "scoped_coefs",
    ScopedCoefsP = "scoped_coefs_p",
    ScopedCoefsStats = "scoped_coefs_stats",
    ScopedCoefsStatsP = "scoped_coefs_stats_p",
    ScopedScale = "scoped_scale",
    ScopedClamp = "scoped_clamp",
    ScopedClampCounts = "scoped_clamp_counts",
    WeighPartials = "weigh_partials",
    FoldPartials = "fold_partials",
    FoldPartialsP = "fold_partials_p",
    ClipCoefOfRanks = "clip_coef_of_ranks",
    ClipCoefOfRanksP = "clip_coef_of_ranks_p",
}

impl Kernel {
    pub(crate) fn norm_partials(norm_type: NormType) -> Self {
        let [l1, l2, inf, p] = [Self::NormPartialsL1, Self::NormPartialsL2, Self::NormPartialsInf, Self::NormPartialsP];
        by_norm(norm_type, l1, l2, inf, p)
    }

    pub(crate) fn clip_coef(norm_type: NormType) -> Self {
        match norm_type {
            NormType::Rms => Self::ClipCoefRms,
            _ => any_order_or(norm_type, Self::ClipCoefP, Self::ClipCoef),
        }
    }

    pub(crate) fn scoped_partials(norm_type: NormType, telemetry: bool) -> Self {
        let [l1, l2, inf, p] = if telemetry {
            [Self::ScopedStatsL1, Self::ScopedStatsL2, Self::ScopedStatsInf, Self::ScopedStatsP]
        } else {
            [Self::ScopedPartialsL1, Self::ScopedPartialsL2, Self::ScopedPartialsInf, Self::ScopedPartialsP]
        };
        by_norm(norm_type, l1, l2, inf, p)
    }

    pub(crate) fn scoped_coefs(norm_type: NormType, telemetry: bool) -> Self {
        let [any_order, others] = if telemetry {
            [Self::ScopedCoefsStatsP, Self::ScopedCoefsStats]
        } else {
            [Self::ScopedCoefsP, Self::ScopedCoefs]
        };
        any_order_or(norm_type, any_order, others)
    }

    pub(crate) fn fold_partials(norm_type: NormType) -> Self {
        any_order_or(norm_type, Self::FoldPartialsP, Self::FoldPartials)
    }

    pub(crate) fn clip_coef_of_ranks(norm_type: NormType) -> Self {
        any_order_or(norm_type, Self::ClipCoefOfRanksP, Self::ClipCoefOfRanks)
    }
}

fn by_norm(norm_type: NormType, l1: Kernel, l2: Kernel, inf: Kernel, p: Kernel) -> Kernel {
    match norm_type {
        NormType::L1 => l1,
        NormType::L2 | NormType::Rms => l2,
        NormType::Inf => inf,
        NormType::P(_) => p,
    }
}

fn any_order_or(norm_type: NormType, any_order: Kernel, others: Kernel) -> Kernel {
    by_norm(norm_type, others, others, others, any_order)
}

"""Waypoints: in a maze that is longer than the horizon, a plan aims at a recorded frame on the way to the goal.

The distance to the goal, in a latent or in metres, leads into dead ends. The training episodes know the way around, and
their frames make a graph, as in Savinov et al. (2018, arXiv:1803.00653), Eysenbach et al. (2019, arXiv:1906.05253) and
Zhang et al. (2021, arXiv:2011.12491). The graph is made from frames alone, and no position goes into it.

    nodes       n_k = argmax_x min_{j<k} ||x - n_j||    latents x of the training frames, spread out by farthest points
    edges       n_i -> n_j, if two frames that are one model step apart in an episode are nearest to n_i and to n_j
    distance    D(i, j): the number of edges, which are model steps, on the shortest path from n_i to n_j
    waypoint    the node `reach` steps along the shortest path from the current frame to the goal;
                the goal itself, if D(now, goal) <= reach

Two frames that an episode joins within the horizon are joined by these edges, too, through the frames between them.
A shortest path is made of the quickest passes on record, and the ball often lacks the speed that they had. So `reach`
is one model step less than the horizon.

Deviation: the papers train a network to say how far apart two frames are, and join those that it believes to be near.
Here only what an episode has done makes an edge, so that no edge leads through a wall.

    python plan.py --ckpt runs/pointmaze-medium_pca --waypoints graph
"""

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from lib.common import UserError
from lib.pictures import write_maze

NODES = 5000


def farthest_points(x, count):
    """Chooses `count` of the points x (S, D). Each is the one that is farthest from those before it (Gonzalez, 1985).

    Returns which they are (count,), the nearest of them to each point (S,), and how far from it the point is (S,).
    """
    chosen, square = [], x.square().sum(1)
    nearest, least = torch.zeros_like(square, dtype=torch.long), torch.full_like(square, torch.inf)
    for n in range(count):
        chosen.append(int(least.argmax()))
        distance = square - 2 * (x @ x[chosen[-1]]) + square[chosen[-1]]  # (S,), squared
        nearest[distance < least] = n
        least = torch.minimum(least, distance)
    return np.array(chosen), nearest.cpu().numpy(), least.clamp(min=0).sqrt()


class Graph:
    """The graph over the frames of the training episodes, as a model sees them.

    Args:
        model: a WorldModel. It only encodes.
        windows: data.Windows of two frames, which are a model step apart.
        tokens: those of all rows, (S, N, d).
        horizon: the model steps of a plan.
        nodes: how many frames become nodes. UserError if there are fewer.

    A latent has a neighbour if it is no more than twice as far from a node as any training frame is.
    """

    def __init__(self, model, windows, tokens, horizon, nodes=NODES):
        dataset, after = windows.dataset, windows.starts + windows.stride
        rows = np.union1d(windows.starts, after)  # in order
        if len(rows) < nodes:
            what = f"{dataset.path} has {len(rows)} training frames, and a graph of waypoints has {nodes} nodes"
            raise UserError(f"{what}: collect more episodes")
        self.model, self.reach = model, max(1, horizon - 1)
        z = self.see({"visual": tokens[rows], "proprio": dataset.states[rows]})
        x = z["visual"].flatten(1)  # (S, N * d)
        chosen, nearest, distance = farthest_points(x, nodes)
        self.x, self.radius = x[chosen], 2 * distance.max()
        self.latents, self.states = {name: latent[chosen] for name, latent in z.items()}, dataset.states[rows[chosen]]
        pairs = [nearest[np.searchsorted(rows, side)] for side in (windows.starts, after)]
        self.edges = csr_matrix((np.ones(len(after)), pairs), (nodes, nodes))

    @torch.no_grad()
    def see(self, obs):
        """Single observations {name: (B, ...) array} -> latents {name: (B, 1, ...)}."""
        device = self.model.action_mean.device
        return self.model.encode({name: torch.from_numpy(o[:, None]).to(device) for name, o in obs.items()})

    def find(self, obs):
        """The nearest node (B,) to each of the observations, and whether it is a neighbour (B,)."""
        distance, node = torch.cdist(self.see(obs)["visual"].flatten(1), self.x).min(1)
        return node.cpu().numpy(), (distance <= self.radius).cpu().numpy()


class Route:
    """The shortest paths to the goals of `worlds` (plan.Worlds), from whatever is seen there now.

    `steps` (B, nodes) is D from each node to each goal, and `next` (B, nodes) is the node that follows on the way.
    Where the graph has no neighbour of the start or the goal, or no path, a plan aims at the goal itself. `log` has
    (problems, the nodes where they are, the nodes at which they aim, whether there is a path) of each round of plans.
    """

    def __init__(self, graph, worlds):
        self.graph, self.worlds, self.log = graph, worlds, []
        goals, self.near = graph.find(worlds.goal_obs)
        options = dict(unweighted=True, return_predecessors=True)
        self.steps, self.next = dijkstra(graph.edges.T, indices=goals, **options)  # backwards, from the goals

    def ahead(self, problems):
        """The node (B,) at which a plan for each of these problems aims now, or -1 for the goal itself."""
        now, near = self.graph.find({name: o[problems, -1] for name, o in self.worlds.past.items()})
        left = self.steps[problems, now]
        known = near & self.near[problems] & np.isfinite(left)
        far, node = known & (left > self.graph.reach), now.copy()
        for _ in range(self.graph.reach):
            node[far] = self.next[problems[far], node[far]]
        node[~far] = -1
        self.log.append((problems, now, node, known))
        return node

    def replace(self, problems, goals):
        """Puts the latents of the waypoints in the place of the goals' {name: (B, 1, ...)}, wherever there is one."""
        node = self.ahead(problems)
        for name, latent in goals.items():
            latent[node >= 0] = self.graph.latents[name][node[node >= 0]]

    def states(self, problems):
        """The true states (B, P) of the waypoints, or of the goals, to which the true simulator plans."""
        node = self.ahead(problems)
        return np.where(node[:, None] >= 0, self.graph.states[node], self.worlds.goals[problems])

    def count(self):
        """The number of plans so far, and of those that had no path."""
        known = np.concatenate([known for *_, known in self.log])
        return len(known), int((~known).sum())

    def draw(self, path):
        """Draws the filmed problems from above. Like the true simulator, and unlike the model, the picture knows
        where the nodes really are."""
        problems, now, aims, _ = map(np.concatenate, zip(*self.log, strict=True))
        env, xy, panels = self.worlds.env, self.graph.states[:, :2], []
        for i, track in enumerate(self.worlds.tracks):
            way = [now[problems == i][0]]
            while self.next[i, way[-1]] >= 0:
                way.append(self.next[i, way[-1]])
            places = dict(path=xy[way], aims=xy[aims[(problems == i) & (aims >= 0)]], track=np.array(track))
            panels.append(places | {"goal": self.worlds.goals[i, :2], "steps": self.steps[i]})
        walls = np.array([env.cell_center(*cell) for cell in np.argwhere(~env.free)])
        write_maze(path, walls, xy, np.transpose(self.graph.edges.nonzero()), panels)

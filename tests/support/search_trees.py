"""Search trees whose pages tests look at."""

from treedecode.decoding.search_tree import SearchTree

HOSTILE = "</script><script>document.title = 'taken'</script><!-- <b>\"quotes\" & 'more' \u2028 \\ {{style}} {{title}}"
QUESTION = "A train has 4 cars with 20 seats in each car. How many seats does the train have?"


def searched():
    """Two steps of three branches each: one pruned, one merged, one come to the answer."""
    tree = SearchTree()
    root = tree.add(-1, "prompt", "Use 3 5 to make 15\n", 7)
    first, second, third = (tree.add(root, "generated", f"3 + {i} = {3 + i}\n", 6, -1.5) for i in range(3))
    tree.nodes[first].score, tree.nodes[first].status = 0.25, "pruned"
    tree.nodes[second].status = "merged"
    given = tree.add(third, "given", "Wait", 1)
    last, other = (tree.add(given, "generated", text, 5, -0.5) for text in ("3 * 5 = 15\n", "5 - 3 = 2\n"))
    tree.nodes[last].score, tree.nodes[last].status = 0.875, "answer"
    tree.nodes[other].status = "final"
    return tree


def large(count):
    tree = SearchTree()
    tree.add(-1, "prompt", "prompt", 3)
    for i in range(1, count):
        tree.add((i - 1) // 3 if i % 5 else i - 1, "generated", f"step {i}\n", 2, -1.0)
    tree.nodes[count // 2].status = "answer"
    return tree


def sampled(num_branches):
    """A prompt with worked examples, and solutions of many steps each."""
    tree = SearchTree()
    root = tree.add(-1, "prompt", f"Question: 1 + 1?\nAnswer: 2\n\nQuestion: {QUESTION}\nAnswer:", 40)
    for i in range(num_branches):
        text = f" Each car has 20 seats.\n With 4 cars that makes {70 + i} seats in all, since 4 * 20 = {70 + i}.\n"
        node = tree.nodes[tree.add(root, "generated", text * (1 + i % 3), 40, -3.0)]
        node.score, node.status = i / 20, "answer" if i == 10 else "final"
    return tree


def deep(depth, width, keep):
    """A breadth-first search: of each level's steps the first ones are kept."""
    tree, kept = SearchTree(), [0]
    tree.add(-1, "prompt", f"Question: {QUESTION}\nAnswer:", 40)
    for level in range(depth):
        steps = [
            tree.add(parent, "generated", f"step {level} " * (1 + i), 9, -1) for parent in kept for i in range(width)
        ]
        for i, step in enumerate(steps):
            tree.nodes[step].score = 1 / (1 + i)
            tree.nodes[step].status = "open" if i < keep else "pruned"
        kept = steps[:keep]
    tree.nodes[kept[0]].status = "answer"
    return tree
